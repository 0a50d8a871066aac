"""`LayerStack`: the linear layers that share factors, and their module paths in a model."""

from dataclasses import dataclass

BANK = "qrefta_factors"  # name of the factor bank at the root of a model
EXPERTS_SUFFIX = "_adapted"  # of the list of linear layers that replaces a fused parameter


@dataclass(frozen=True)
class LayerStack:
    """The K linear layers of one role and one shape.

    Attributes:
        name: module path with `*` for the layer number, e.g.
            `encoder.layer.*.attention.self.query`.
        modules: module paths in layer order; of experts the paths of their fused parameters, one a
            block.
        out_features, in_features: shape of every weight, always read as (out, in).
        transposed: weights are stored as (in, out): by `Conv1D` (GPT-2), and in some fused
            parameters.
        experts: slices of every fused parameter, which follow one another among the K; 0 for linear
            layers.
    """

    name: str
    modules: tuple[str, ...]
    out_features: int
    in_features: int
    transposed: bool = False
    experts: int = 0

    @property
    def layers(self) -> int:
        """K."""
        return len(self.modules) * max(self.experts, 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, out, in)."""
        return self.layers, self.out_features, self.in_features

    @property
    def adapted(self) -> tuple[str, ...]:
        """Module paths of the K adapted linear layers, once the model is prepared."""
        if not self.experts:
            return self.modules
        return tuple(
            expert_path(path, expert) for path in self.modules for expert in range(self.experts)
        )

    def module_and_expert(self, index: int) -> tuple[str, int]:
        """The entry of `modules` that holds weight number `index`, and its expert (0 for a linear
        layer).
        """
        module, expert = divmod(index, max(self.experts, 1))
        return self.modules[module], expert


def expert_path(path: str, expert: int) -> str:
    """Module path of one expert's adapted linear layer, by the path of the fused parameter."""
    return f"{path}{EXPERTS_SUFFIX}.{expert}"
