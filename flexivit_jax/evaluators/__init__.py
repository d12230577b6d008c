"""What is measured of a model. `registry.EVALUATORS` names the evaluators, `base.Evaluator` is their interface."""
