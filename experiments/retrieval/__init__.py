"""The official evaluations of retrieval and copy detection: folders, features, scores."""
