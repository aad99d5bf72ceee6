"""The endpoint: a Ray Serve application that serves priors of activations over HTTP."""
