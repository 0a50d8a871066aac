"""Every private name of other packages that qrefta uses.

There is one module for each package. A private name can change in any release. The names stand
here, each with the reason, the oldest release in which it was checked, and a replacement.
tests/test_compat.py checks that no other module has one. pyproject.toml admits releases up to the
newest with which all tests passed.

The modules are imported by the code that needs them, so that `import qrefta` stays light: nothing
is imported here.
"""

# Private methods that subclasses in qrefta override, because the packages offer no other hook. They
# are called as `super()._name` in the subclass.
OVERRIDDEN = {
    # torch: called by `module.to`, `.half` and others. Factors must keep their float32 masters. In
    # 2.8 or earlier.
    "_apply",
    # torch: called by `load_state_dict` for each module. Rounded copies of the factors are dropped
    # there. In 2.8 or earlier.
    "_load_from_state_dict",
    # transformers: Trainer writes a checkpoint in it. qrefta writes to another folder and renames.
    # In 5.0 or earlier. If it goes: a callback that runs after saving, with checkpoints that may be
    # incomplete while they are written.
    "_save_checkpoint",
    # lm-evaluation-harness: loads the model. It passes the quantization_config of config.json on as
    # an argument, and transformers warns of two. In 0.4.10 or earlier. If it goes: the warning.
    "_create_model",
}
