"""The mapper: images of every kind, boxes that follow them, the recipe's augmentations."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from PIL import Image

from asag.config import add_asag_config
from asag.data import ImageReadError, SparseDetectionMapper, read_image
from asag.data.mapper import ResizeShortestEdge, train_augmentations


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_asag_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (60, 80)
    cfg.INPUT.MAX_SIZE_TRAIN = 200
    return cfg


@pytest.fixture
def sample(tmp_path):
    """A 100x50 picture with a bright box at 20..40 x 10..30, and the boxes around it."""
    pixels = np.zeros((50, 100, 3), dtype=np.uint8)
    pixels[10:30, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "box.png")
    xywh, xyxy = BoxMode.XYWH_ABS, BoxMode.XYXY_ABS
    return {
        "file_name": str(tmp_path / "box.png"),
        "height": 50,
        "width": 100,
        "image_id": 5,
        "annotations": [
            {"bbox": [20, 10, 20, 20], "bbox_mode": xywh, "category_id": 2, "iscrowd": 0},
            {"bbox": [20, 10, 40, 30], "bbox_mode": xyxy, "category_id": 1},
            {"bbox": [0, 0, 50, 50], "bbox_mode": xywh, "category_id": 3, "iscrowd": 1},
            {"bbox": [90, 40, 30, 30], "bbox_mode": xywh, "category_id": 0, "iscrowd": 0},
            {"bbox": [120, 10, 20, 20], "bbox_mode": xywh, "category_id": 4, "iscrowd": 0},
        ],
    }


def plain(*augmentations) -> SparseDetectionMapper:
    return SparseDetectionMapper(is_train=True, augmentations=augmentations, image_format="RGB")


def test_boxes_are_converted_clipped_and_sorted_out(sample):
    before = copy.deepcopy(sample)
    made = plain()(sample)
    assert sample == before
    assert made["image"].shape == (3, 50, 100)
    assert made["image"].dtype == torch.uint8
    assert made["instances"].image_size == (50, 100)
    assert made["instances"].gt_classes.tolist() == [2, 1, 0]
    expected = [[20, 10, 40, 30], [20, 10, 40, 30], [90, 40, 100, 50]]
    assert made["instances"].gt_boxes.tensor.tolist() == expected
    assert (made["image_id"], made["height"], made["width"]) == (5, 50, 100)
    assert "annotations" not in made


@pytest.mark.parametrize("crop", [False, True])
def test_boxes_follow_the_pixels(cfg, sample, crop):
    cfg.INPUT.CROP.ENABLED = crop
    cfg.INPUT.CROP.PRE_RESIZE = (80, 100)
    cfg.INPUT.CROP.SIZE = [60, 90]
    cfg.INPUT.CROP.PROB = 1.0
    mapper = SparseDetectionMapper(cfg, is_train=True)
    np.random.seed(0)
    checked = 0
    for _ in range(20):
        made = mapper(sample)
        height, width = made["image"].shape[1:]
        assert made["instances"].image_size == (height, width)
        bright = (made["image"][0] > 127).nonzero()
        if len(bright) < 100:
            continue
        (y1, x1), (y2, x2) = bright.min(dim=0).values, bright.max(dim=0).values + 1
        seen = Boxes(torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32))
        assert pairwise_iou(seen, made["instances"].gt_boxes)[0].max() > 0.85
        checked += 1
    assert checked > 10


def test_crop_keeps_images_that_lose_all_boxes(sample):
    made = plain(T.CropTransform(0, 40, 10, 10))(sample)
    assert len(made["instances"]) == 0
    assert made["instances"].gt_boxes.tensor.shape == (0, 4)
    assert made["image"].shape == (3, 10, 10)


def test_images_without_annotations_are_kept(sample):
    for annotations in ({"annotations": []}, {}):
        rest = {key: value for key, value in sample.items() if key != "annotations"}
        made = plain()(rest | annotations)
        assert len(made["instances"]) == 0
        assert made["instances"].gt_classes.dtype == torch.int64


def test_order_of_the_recipe(cfg):
    cfg.INPUT.CROP.ENABLED = True
    flip, pair, resize = train_augmentations(cfg)
    assert isinstance(flip, T.RandomFlip)
    assert [type(a) for a in pair.aug.augs] == [ResizeShortestEdge, T.RandomCrop]
    assert pair.prob == 0.5
    assert pair.aug.augs[0].short_edge_length == (400, 500, 600)
    assert tuple(pair.aug.augs[1].crop_size) == (384, 600)
    assert resize.short_edge_length == (60, 80)


def test_crop_probability(cfg, sample):
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (50,)
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.PRE_RESIZE = (60,)
    cfg.INPUT.CROP.SIZE = [30, 30]
    mapper = SparseDetectionMapper(cfg, is_train=True)
    np.random.seed(0)
    cropped = sum(mapper(sample)["image"].shape != (3, 50, 100) for _ in range(200))
    assert 70 < cropped < 130


def test_evaluation_resizes_only(cfg, sample):
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 100, 160
    made = SparseDetectionMapper(cfg, is_train=False)(sample)
    assert made["image"].shape == (3, 80, 160)
    assert "instances" not in made
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert SparseDetectionMapper(cfg, is_train=False)(sample)["image"].shape == (3, 50, 100)


def test_training_sample_without_augmentation(cfg, sample):
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.PROB = "horizontal", True, 1.0
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 100, 1000
    for _ in range(4):
        made = SparseDetectionMapper.without_augmentation(cfg)(sample)
        assert made["image"].shape == (3, 100, 200)
        assert made["instances"].gt_boxes.tensor[0].tolist() == [40, 20, 80, 60]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.FORMAT", "HSV"),
        ("INPUT.RANDOM_FLIP", "diagonal"),
        ("INPUT.CROP.TYPE", "round"),
        ("INPUT.CROP.SIZE", [600, 384]),
        ("INPUT.CROP.PROB", 1.5),
        ("INPUT.CROP.PRE_RESIZE", ()),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "all"),
    ],
)
def test_wrong_values_name_their_key(cfg, key, value):
    cfg.INPUT.CROP.ENABLED = True
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        SparseDetectionMapper(cfg, is_train=True)


def test_range_sampling_needs_two_sizes(cfg):
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    cfg.INPUT.MIN_SIZE_TRAIN = (60, 70, 80)
    with pytest.raises(ValueError, match=r"INPUT\.MIN_SIZE_TRAIN "):
        SparseDetectionMapper(cfg, is_train=True)


def test_wrong_size_names_the_file(sample):
    with pytest.raises(SizeMismatchError, match=r"box\.png"):
        plain()(sample | {"width": 101})


def test_size_before_the_exif_orientation_is_named(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "t.jpg", exif=exif)
    record = {"file_name": str(tmp_path / "t.jpg"), "image_id": 1, "width": 40, "height": 30}
    with pytest.raises(SizeMismatchError, match=r"t\.jpg has 30 x 40 .*EXIF.* says 40 x 30"):
        plain()(record)


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1)])
def test_extreme_shapes_keep_a_pixel(shape):
    image = np.zeros((*shape, 3), np.uint8)
    resized = ResizeShortestEdge((60,), 200, "choice").get_transform(image).apply_image(image)
    assert sorted(resized.shape[:2]) == [1, 200]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 0.5, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ImageReadError, match=r"f\.tif has floating-point.*8 bits"):
        read_image(str(tmp_path / "f.tif"), "RGB")


def test_color_order(tmp_path):
    Image.new("RGB", (4, 3), (10, 20, 30)).save(tmp_path / "c.png")
    assert read_image(str(tmp_path / "c.png"), "RGB")[0, 0].tolist() == [10, 20, 30]
    assert read_image(str(tmp_path / "c.png"), "BGR")[0, 0].tolist() == [30, 20, 10]
    assert read_image(str(tmp_path / "c.png"), "L").shape == (3, 4, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (6, 5), (255, 255, 255)).convert(mode).save(path)
    pixels = read_image(str(path), "RGB")
    assert pixels.shape == (5, 6, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == 255).all()


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(tmp_path / "p.png", transparency=1)
    assert read_image(str(tmp_path / "p.png"), "RGB")[0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    gray = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / f"g.{suffix}")
    assert read_image(str(tmp_path / f"g.{suffix}"), "RGB")[0, :, 1].tolist() == [0, 1, 100, 255]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    image = Image.new("RGB", (8, 4))
    image.paste((255, 255, 255), (0, 0, 2, 4))
    image.save(tmp_path / "e.png", exif=exif)
    pixels = read_image(str(tmp_path / "e.png"), "RGB")
    assert pixels.shape == (8, 4, 3)
    assert (pixels[:2] == 255).all()
    assert (pixels[2:] == 0).all()


def test_unreadable_files_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for name, reason in (
        ("cut.jpg", "truncated"),
        ("text.jpg", "identify"),
        ("empty.jpg", "identify"),
        ("absent.jpg", "no image file"),
    ):
        with pytest.raises(ImageReadError, match=reason) as error:
            read_image(str(tmp_path / name), "RGB")
        assert str(tmp_path / name) in str(error.value)
