"""The Serve deployments behind the HTTP ingress: one per prior, and one for the language model."""
