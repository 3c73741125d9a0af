"""From GenerateConfigs to pictures, with a model that stays loaded. Never imports Lightning."""
