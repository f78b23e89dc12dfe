"""The main job from end to end on real text."""
