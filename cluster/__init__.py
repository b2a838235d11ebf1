"""How a cluster is brought up: `ray up` files, Kubernetes manifests, images; and what generates some of them."""
