"""MLflow: one run per job, and the registry of models that serving reads. Runs without Ray and HTTP."""
