from forwardgrad.pipeline.stages import split_stages as split_stages
from forwardgrad.pipeline.step import PipelineStep as PipelineStep
