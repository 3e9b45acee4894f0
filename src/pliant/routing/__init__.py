"""Which computation runs: methods that choose, input by input, what is executed."""

from pliant.routing.duo_llm import DuoLLM
from pliant.routing.dynamic_dino import DynamicDINO
from pliant.routing.jei_dnn import JEIDNN, ThresholdExit
from pliant.routing.loss_free_balancing import LossFreeBalancer, MoE, Router
from pliant.routing.stop_exit import StopExit

__all__ = ["JEIDNN", "DuoLLM", "DynamicDINO", "LossFreeBalancer", "MoE", "Router", "StopExit", "ThresholdExit"]
