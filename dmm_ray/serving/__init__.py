"""The endpoint: a Ray Serve application that answers questions about activations over HTTP."""
