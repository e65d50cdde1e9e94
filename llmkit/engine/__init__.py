"""The step loop: plan, launch, land."""
