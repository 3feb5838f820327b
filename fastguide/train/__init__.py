"""Training value guides: rewards, rollouts of the policy, TD(lambda)."""
