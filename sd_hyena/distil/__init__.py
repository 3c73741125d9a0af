"""From a TrainConfig to trained students: data, stages, the LightningModule, runs. Knows no tile fusion."""
