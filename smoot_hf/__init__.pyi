from . import data as data
from . import evaluation as evaluation
from . import functional as functional
from . import models as models
from .data import InputPipeline as InputPipeline
from .data import load_image_dataset as load_image_dataset
from .errors import PushError as PushError
from .errors import SaveError as SaveError
from .evaluation import Convention as Convention
from .evaluation import Faithfulness as Faithfulness
from .evaluation import attribute as attribute
from .evaluation import compare_faithfulness as compare_faithfulness
from .evaluation import evaluate_faithfulness as evaluate_faithfulness
from .evaluation import evaluate_localisation as evaluate_localisation
from .models import PaperCnnConfig as PaperCnnConfig
from .models import PaperCnnForImageClassification as PaperCnnForImageClassification
from .models import load_model as load_model
from .presets import PRESETS as PRESETS
from .training import MaskBudget as MaskBudget
from .training import SmootMixin as SmootMixin
from .training import SmootSettings as SmootSettings
from .training import SmootTrainer as SmootTrainer
from .training import SmootTrainingArguments as SmootTrainingArguments
from .training import masked_step as masked_step

__version__: str
