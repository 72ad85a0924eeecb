"""ADE20K's scene parsing benchmark of 150 classes.

Zhou et al., "Semantic Understanding of Scenes through the ADE20K Dataset", arXiv:1608.05442.
"""

from collections.abc import Sequence

from datamodules.segmentation import MaskedImages, SegmentationData, pair_files
from retinue.utils.masks import IGNORED

# Names by label: the first name in each line of objectInfo150.txt.
CLASS_NAMES = (
    """
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person; earth; door; table;
mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug; field; armchair; seat;
fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard; chest of drawers; counter;
sand; sink; skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway; case; pool table; pillow;
screen door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower; book; hill; bench; countertop;
stove; palm; kitchen island; computer; swivel chair; boat; bar; arcade machine; hovel; bus; towel; light; truck; tower;
chandelier; awning; streetlight; booth; television receiver; airplane; dirt track; apparel; pole; land; bannister;
escalator; ottoman; bottle; buffet; poster; stage; van; ship; fountain; conveyer belt; canopy; washer; plaything;
swimming pool; stool; barrel; basket; waterfall; tent; bag; minibike; cradle; oven; ball; food; step; tank; trade name;
microwave; pot; animal; bicycle; lake; dishwasher; screen; blanket; sculpture; hood; sconce; vase; traffic light; tray;
ashcan; fan; pier; crt screen; plate; monitor; bulletin board; shower; radiator; glass; clock; flag
""".replace("\n", " ")
    .strip()
    .split("; ")
)

# Folder of each split.
FOLDERS = {"train": "training", "val": "validation"}


class ADE20K(SegmentationData):
    """ADE20K in the layout of ADEChallengeData2016.zip.

    The images are in `root`/images/{training,validation} and the masks in `root`/annotations/{training,validation}. The
    mask values 1 to 150 are the classes; 0 marks pixels of other objects, which are ignored. The test split is the
    validation split, because the labels of the test set are not public.
    """

    class_names = CLASS_NAMES
    values = {label + 1: label for label in range(len(CLASS_NAMES))} | {0: IGNORED}

    @property
    def splits(self) -> Sequence[str]:
        return tuple(FOLDERS)

    def load(self, split: str) -> MaskedImages:
        assert self.root is not None
        folders = self.root / "images" / FOLDERS[split], self.root / "annotations" / FOLDERS[split]
        return MaskedImages(*folders, pair_files(*folders), self.values)
