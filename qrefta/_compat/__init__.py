"""Every private name of torch, transformers, accelerate and bitsandbytes that qrefta uses, one module a package.

A private name can change in any release. The names stand here, each with the reason, the first release that is known to
have it, and what to do if it goes, and nowhere else: tests/test_compat.py checks that. pyproject.toml admits releases
up to the newest with which all tests passed.

The modules are imported by the code that needs them, so that `import qrefta` stays light: nothing is imported here.
"""

# Private methods that subclasses in qrefta override, because the packages offer no other hook. They are called as
# `super()._name`, where the class is.
OVERRIDDEN = {
    # torch: called by `module.to`, `.half` and others. Factors must keep their float32 masters. Since 1.0.
    "_apply",
    # torch: called by `load_state_dict` for each module. Rounded copies of the factors are dropped there. Since 1.0.
    "_load_from_state_dict",
    # transformers: Trainer writes a checkpoint in it. qrefta writes to another folder and renames. Since 3.0. If it goes:
    # a callback that runs after saving, with checkpoints that may be incomplete while they are written.
    "_save_checkpoint",
}
