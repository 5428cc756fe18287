"""What a recipe leaves to its sorted parent to say: the order in which layers are left out."""

from dataclasses import replace

from megatron_elastic.checkpoint import find_checkpoint, read_metadata
from megatron_elastic.config import Recipe
from megatron_elastic.recipe_family import with_depth_ranking


def with_ranked_layers(recipe: Recipe) -> Recipe:
    """The recipe with its layers ranked as its parent's description says, where depth is elastic.

    Raises:
        CheckpointError: there is no parent, or its layers were not ranked.
    """
    family = recipe.family
    if len(family.choices["depth"]) == 1 or family.depth_ranking:
        return recipe
    described = read_metadata(find_checkpoint(recipe.parent))
    ranking = () if described is None else described.depth_ranking
    return replace(recipe, family=with_depth_ranking(family, ranking, recipe.parent))
