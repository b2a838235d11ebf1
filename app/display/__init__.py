"""What commands show in the terminal, one file for each kind of result."""
