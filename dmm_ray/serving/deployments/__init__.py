"""The Serve deployments behind the HTTP side: one for each prior, one for the language model."""
