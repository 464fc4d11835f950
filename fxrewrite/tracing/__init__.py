"""From a model to graphs: traced as a whole or in parts, or explained why not."""
