"""Finds the weights of a data mixture: small proxies on many mixtures, a surrogate fitted to them, an exact optimum."""
