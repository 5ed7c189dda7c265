"""The main job: from a model, its data and a budget to a certified artefact."""
