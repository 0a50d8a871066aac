"""The quickstart: the main job, from a dense model to a merged one, on real data."""
