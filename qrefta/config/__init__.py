"""The settings of `prepare`, the stacks of a model, and the report of what preparing did to each.

Nothing here imports torch: the command line, the model card and the plug-in read the same settings.
"""
