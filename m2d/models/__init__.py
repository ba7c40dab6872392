"""The networks. Pure torch: no Ray, no wandb, nothing from the rooms above."""
