from forwardgrad.lab.layers.kept_weights import chosen_runs as chosen_runs
from forwardgrad.lab.layers.kept_weights import train_again as train_again
from forwardgrad.lab.layers.measuring import LayersSetting as LayersSetting
from forwardgrad.lab.layers.measuring import measure_layers as measure_layers
