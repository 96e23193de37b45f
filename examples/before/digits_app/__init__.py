"""FedAdam on scikit-learn's digits."""
