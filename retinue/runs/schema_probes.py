"""Types, ranges and meanings of the keys of the section `probe` of probe.py, by the probe's name."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from retinue.runs.schema_messages import Expected
from retinue.runs.schema_sections import Count, Keys, NonNegative, Positive

LearningRates = Annotated[list[Positive], Field(min_length=1)]
Counts = Annotated[list[Count], Field(min_length=1)]
DataSets = Annotated[
    list[Annotated[str, Field(min_length=1)] | dict[str, Any]],
    Expected("a list of names of data, or of mappings such as {name: image_folder, root: DIR}"),
]
RATES = "learning rates for 256 images a step, of which one is chosen"


class Probe(Keys):
    """Key that all probes have."""

    name: str = Field(description="name of the probe")


class Linear(Probe):
    """`conf/probe/linear.yaml`."""

    learning_rates: LearningRates = Field(description=RATES)
    weight_decays: Annotated[list[NonNegative], Field(min_length=1)] = Field(
        description="weight decays, of which one is chosen"
    )
    epochs: Count = Field(description="passes over the features of the training images")
    batch_size: Count = Field(description="images a step, at most all of them")


class Logistic(Probe):
    """`conf/probe/logistic.yaml`."""

    strengths: LearningRates = Field(description="inverse strengths C of the regularisation, of which one is chosen")
    max_iterations: Count = Field(description="largest number of iterations of L-BFGS")


class Knn(Probe):
    """`conf/probe/knn.yaml`."""

    k: Counts = Field(description="numbers of neighbours, of which one is chosen")
    temperature: Positive = Field(description="temperature of the votes' weights")


class Attentive(Probe):
    """`conf/probe/attentive.yaml`."""

    pool: Literal["ep", "abmilp", "simpool", "siglip", "aim", "jepa"] = Field(description="pool of the tokens")
    queries: Count = Field(description="queries of ep; times reduction they divide the channels of the tokens")
    reduction: Count = Field(description="factor by which the output of ep has fewer channels than the tokens")
    num_heads: Count = Field(description="attention heads of siglip, aim and jepa; they divide the channels")
    optimizer: Literal["lars", "adamw"] = Field(description="lars: the EP paper's, for tens of thousands of steps")
    learning_rates: LearningRates = Field(description=RATES)
    epochs: Count = Field(description="passes over the features of the training images")
    warmup_epochs: NonNegative = Field(description="epochs in which the learning rate rises linearly")
    batch_size: Count = Field(description="images a step, at most all of them")


class FewShot(Probe):
    """`conf/probe/few_shot.yaml`."""

    shots: Counts = Field(description="numbers of training images of each class")
    draws: Count = Field(description="number of draws of these images, with the seeds 0, 1, ...")
    l2: Positive = Field(description="strength of the regularisation")


class Retrieval(Probe):
    """`conf/probe/retrieval.yaml`."""

    gallery: Literal["train", "test"] = Field(
        description="images that are searched for each test image; test: the other test images"
    )
    ranks: Counts = Field(description="ranks of the recall")


class Outliers(Probe):
    """`conf/probe/ood.yaml`."""

    near: DataSets = Field(description="data sets whose test images are near the data")
    far: DataSets = Field(description="data sets whose test images are far from the data")
    classifier: Literal["own", "logistic"] = Field(
        description="classifier of the logits; own: the net's; logistic: one that is fitted to the features"
    )
    k: Count = Field(description="the neighbour whose similarity is the score knn")

    @model_validator(mode="after")
    def _has_a_set(self) -> Self:
        if not self.near and not self.far:
            raise ValueError("probe=ood needs other data, such as probe.near=[fashion_mnist] or probe.far=[cifar10]")
        return self


PROBES: dict[str, type[Probe]] = {
    "linear": Linear, "logistic": Logistic, "knn": Knn, "attentive": Attentive, "few_shot": FewShot,
    "retrieval": Retrieval, "ood": Outliers,
}  # fmt: skip
