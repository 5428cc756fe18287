"""What a recipe leaves to its sorted parent to say: the order in which layers are left out."""

from dataclasses import replace

from megatron_elastic.checkpoint import find_checkpoint, read_metadata
from megatron_elastic.config import Recipe
from megatron_elastic.errors import RecipeError
from megatron_elastic.precision import skipped_end_fault
from megatron_elastic.recipe_family import with_depth_ranking


def with_ranked_layers(recipe: Recipe) -> Recipe:
    """The recipe with its layers ranked as its parent's description says, where depth is elastic.

    Raises:
        CheckpointError: there is no parent, or its layers were not ranked.
        RecipeError: the ranking leaves out layers that FP8 leaves unquantised.
    """
    family = recipe.family
    if len(family.choices["depth"]) == 1 or family.depth_ranking:
        return recipe
    described = read_metadata(find_checkpoint(recipe.parent))
    ranking = () if described is None else described.depth_ranking
    ranked = with_depth_ranking(family, ranking, recipe.parent)
    fault = skipped_end_fault(recipe.precision, ranked.ever_skipped, len(ranked.shape.pattern))
    if fault is not None:
        raise RecipeError([f"elastic.axes.depth: {fault}"], recipe.source)
    return replace(recipe, family=ranked)
