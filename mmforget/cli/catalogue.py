"""What there is, as one static table: names, where they are, one line each. Imports no torch.

This is the only registry of mmforget, and only for `mmforget list`, for short class names and for
suggestions: a class that is not in it works by its dotted path. A test compares it with the
classes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One thing that can be listed.

    Args:
        target: ``module:name``.
        summary: one line.
        paper: where it was published, empty for our own.
        capabilities: what a method needs of a model, or what a model offers.
        reads: the retain data that a method reads, its `DataAccess.retain`.
        samples: what the samples of a model's data sets carry, ``labels`` or ``captions``; empty
            where methods read none.
    """

    target: str
    summary: str
    paper: str = ""
    capabilities: tuple[str, ...] = ()
    reads: str = ""
    samples: str = "labels"

    @property
    def name(self) -> str:
        """Class or function name, which is also the short name in configurations."""
        return self.target.partition(":")[2]


_PICTURES = ("TextConditioned", "Generates", "Sites")
_GANS = ("Generates", "HasLatents")
_FEATURES = ("HasLoss", "HasLogits", "HasFeatures", "HasHead", "Sites")

MODELS = (
    Entry(
        "mmforget.models.classifier:ImageClassifier",
        "image classifiers of timm, torchvision and transformers, or any network of yours",
        capabilities=_FEATURES,
    ),
    Entry(
        "mmforget.models.detector:Detector",
        "detectors: DETR, Deformable and Conditional DETR, RT-DETR, Faster R-CNN, RetinaNet, FCOS",
        capabilities=("HasLoss", "HasLogits", "HasHead", "Sites"),
    ),
    Entry(
        "mmforget.models.multimodal:MultimodalLM",
        "multimodal language models: LLaVA, Qwen2-VL, Qwen2.5-VL, Idefics3, SmolVLM, InternVL",
        capabilities=("HasLoss", "HasFeatures", "HasHead", "Answers", "Sites"),
    ),
    Entry(
        "mmforget.models.diffusion:DiffusionGenerator",
        "text-to-image pipelines of diffusers: Stable Diffusion 1, 2, XL, 3, FLUX",
        capabilities=("HasLoss", "Sites", "TextConditioned", "Generates"),
        samples="captions",
    ),
    Entry(
        "mmforget.models.gan:ImageGAN",
        "generators of GANs: ours, StyleGAN2 and 3, BigGAN, or any network of yours",
        capabilities=("Sites", "Generates", "HasLatents"),
        samples="",
    ),
    Entry(
        "mmforget.models.clip:ClipModel",
        "CLIP models of open_clip",
        capabilities=("HasLoss", "HasFeatures"),
        samples="captions",
    ),
)

DATA = (
    Entry("mmforget.data.digit_world:DigitWorld", "real handwritten digits in colour, built in"),
    Entry("mmforget.data.cifar:CIFAR10", "CIFAR-10: 60,000 photos in 10 classes"),
    Entry("mmforget.data.cifar:CIFAR100", "CIFAR-100: 60,000 photos in 100 classes"),
    Entry("mmforget.data.torchvision_data:TorchvisionData", "any data set of torchvision"),
    Entry("mmforget.data.image_folder:ImageFolderData", "a folder with one folder per class"),
    Entry("mmforget.data.huggingface:HuggingFaceData", "a data set of the hub or local files"),
    Entry(
        "mmforget.data.digit_scenes:DigitScenes",
        "boxes: several handwritten digits on one canvas, built in",
    ),
    Entry(
        "mmforget.data.coco:CocoFolder", "boxes: annotation files of COCO's format, and pictures"
    ),
    Entry(
        "mmforget.data.huggingface_detection:HuggingFaceDetection",
        "boxes: an object-detection data set of the hub or local files",
    ),
    Entry(
        "mmforget.data.digit_questions:DigitQuestions",
        "questions: handwritten digits as faces of fictitious persons, built in",
    ),
    Entry(
        "mmforget.data.question_files:QuestionFolder",
        "questions: a file of JSON lines, and pictures in a folder",
    ),
    Entry(
        "mmforget.data.huggingface_questions:HuggingFaceQuestions",
        "questions: a data set of the hub or local files",
    ),
)

METHODS = (
    Entry(
        "mmforget.methods.gs_lora:GSLoRA",
        "bounded forgetting in group-sparse adapters of the feed-forward layers",
        "CVPR 2024, arXiv 2403.11530",
        ("HasLoss", "HasHead", "Sites"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.gs_lora_plus_plus:GSLoRAPlusPlus",
        "GSLoRA with prototypes, also for few samples and missing classes",
        "T-PAMI 2026, arXiv 2501.09705",
        ("HasLoss", "HasHead", "Sites"),
        "full",
    ),
    Entry(
        "mmforget.methods.ssd:SSD",
        "dampen the weights that matter more to the forget set than to the rest",
        "AAAI 2024, arXiv 2308.07707",
        (),
        "statistics",
    ),
    Entry(
        "mmforget.methods.neg_grad_plus:NegGradPlus",
        "descend on the retain loss, ascend on the forget loss",
        "NeurIPS 2023, arXiv 2302.09880",
        ("HasLoss",),
        "full",
    ),
    Entry(
        "mmforget.methods.random_labels:RandomLabels",
        "train the forget set on wrong labels and the rest on its own",
        "AAAI 2021, arXiv 2010.10981",
        ("HasLoss", "HasLogits"),
        "full",
    ),
    Entry(
        "mmforget.methods.scrub:SCRUB",
        "away from the original model on the forget set, close to it on the rest",
        "NeurIPS 2023, arXiv 2302.09880",
        ("HasLoss", "HasLogits", "HasFeatures"),
        "full",
    ),
    Entry(
        "mmforget.methods.salun:SalUn",
        "random labels on the most salient weights, all others strictly frozen",
        "ICLR 2024, arXiv 2310.12508",
        ("HasLoss", "HasLogits"),
        "full",
    ),
    Entry(
        "mmforget.methods.retrain:Retrain",
        "the oracle: train again from fresh weights without the forget set",
        "",
        ("HasLoss",),
        "full",
    ),
    Entry(
        "mmforget.methods.gradient_ascent:GradientAscent",
        "answers: raise the loss of the forget set and nothing else, a baseline",
        "ACL 2023, arXiv 2210.01504",
        ("HasLoss", "Answers"),
        "none",
    ),
    Entry(
        "mmforget.methods.grad_diff:GradDiff",
        "answers: ascend on the forget set, descend on the rest",
        "CoLLAs 2022, arXiv 2203.12817",
        ("HasLoss", "Answers"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.kl_minimization:KLMinimization",
        "answers: ascend on the forget set, answer the rest as before",
        "COLM 2024, arXiv 2401.06121",
        ("HasLoss", "Answers"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.preference_optimization:PreferenceOptimization",
        "answers: learn to refuse what is to be forgotten",
        "COLM 2024, arXiv 2401.06121",
        ("HasLoss", "Answers"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.sine_project:SineProject",
        "answers: refusals, with a projector that may move by sines only",
        "CVPR 2026, arXiv 2511.18444",
        ("HasLoss", "Answers"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.dpo:DPO",
        "answers: prefer refusals to what is to be forgotten",
        "NeurIPS 2023, arXiv 2305.18290",
        ("HasLoss", "Answers"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.npo:NPO",
        "answers: ascent that slows down, measured against the original model",
        "COLM 2024, arXiv 2404.05868",
        ("HasLoss", "Answers"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.sim_npo:SimNPO",
        "answers: NPO per token, without the original model",
        "arXiv 2410.07163",
        ("HasLoss", "Answers"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.rmu:RMU",
        "answers: misdirect the states of one layer at what is to be forgotten",
        "ICML 2024, arXiv 2403.03218",
        ("HasLoss", "Answers", "Sites"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.manu:MANU",
        "answers: zero the neurons that matter to the forget set, with and without picture",
        "ACL 2025, arXiv 2502.15910",
        ("Answers",),
        "statistics",
    ),
    Entry(
        "mmforget.methods.mm_unlearner:MMUnlearner",
        "answers: ascend and descend on the weights that only the forget set needs",
        "ACL 2025, arXiv 2502.11051",
        ("HasLoss", "Answers"),
        "full",
    ),
    Entry(
        "mmforget.methods.uce:UCE",
        "concepts: one linear solve of the layers that read text, in seconds",
        "WACV 2024, arXiv 2308.14761",
        ("TextConditioned",),
        "none",
    ),
    Entry(
        "mmforget.methods.rece:RECE",
        "concepts: UCE, repeated on the embeddings that would bring the concept back",
        "ECCV 2024, arXiv 2407.12383",
        ("TextConditioned",),
        "none",
    ),
    Entry(
        "mmforget.methods.esd:ESD",
        "concepts: train the denoiser on its own guidance turned round; whole or as a LoRA",
        "ICCV 2023, arXiv 2303.07345",
        ("TextConditioned", "Generates", "Sites"),
        "none",
    ),
    Entry(
        "mmforget.methods.concept_ablation:ConceptAblation",
        "concepts: answer the concept's prompt as that of its anchor",
        "ICCV 2023, arXiv 2303.13516",
        ("TextConditioned", "Generates", "Sites"),
        "none",
    ),
    Entry(
        "mmforget.methods.concept_salun:ConceptSalUn",
        "concepts: SalUn for denoisers, on the most salient weights only",
        "ICLR 2024, arXiv 2310.12508",
        ("TextConditioned", "Generates", "Sites"),
        "none",
    ),
    Entry(
        "mmforget.methods.sld:SLD",
        "concepts: guidance away from them; changes no weights",
        "CVPR 2023, arXiv 2211.05105",
        ("TextConditioned", "Generates"),
        "none",
    ),
    Entry(
        "mmforget.methods.subspace_pruning:SubspacePruning",
        "memories: zero the weights that memorized prompts use more than others",
        "arXiv 2406.18566",
        _PICTURES,
        "none",
    ),
    Entry(
        "mmforget.methods.neuron_ratio_pruning:NeuronRatioPruning",
        "memories: zero hidden units that memorized prompts use many times more",
        "",
        _PICTURES,
        "none",
    ),
    Entry(
        "mmforget.methods.nemo:NeMo",
        "memories: zero the value neurons that stand out at memorized prompts",
        "NeurIPS 2024, arXiv 2406.02366",
        _PICTURES,
        "none",
    ),
    Entry(
        "mmforget.methods.adversarial_fine_tuning:AdversarialFineTuning",
        "memories: fine-tune against embeddings that bring pictures back",
        "2025",
        _PICTURES,
        "full",
    ),
    Entry(
        "mmforget.methods.siss:SISS",
        "memories: lower one error and raise the other by importance sampling",
        "ICLR 2025, arXiv 2503.01034",
        _PICTURES,
        "full",
    ),
    Entry(
        "mmforget.methods.perp:PERP",
        "memories: retrain biases, norms or a LoRA after pruning",
        "arXiv 2312.15230",
        _PICTURES,
        "full",
    ),
    Entry(
        "mmforget.methods.retain_fine_tuning:RetainFineTuning",
        "memories: fine-tune on ordinary pictures only, a baseline",
        "",
        _PICTURES,
        "full",
    ),
    Entry(
        "mmforget.methods.pruning_controls:RandomPruning",
        "control: as many weights as a mask, at random",
        "",
        _PICTURES,
        "none",
    ),
    Entry(
        "mmforget.methods.pruning_controls:MagnitudePruning",
        "control: as many weights as a mask, the largest",
        "",
        _PICTURES,
        "none",
    ),
    Entry(
        "mmforget.methods.pruning_controls:BaseOnlyPruning",
        "control: as many weights as a mask, by ordinary prompts",
        "",
        _PICTURES,
        "none",
    ),
    Entry(
        "mmforget.methods.text_to_unlearn:TextToUnlearn",
        "GANs: push pictures and edits away from a text, keep the others",
        "arXiv 2504.01218",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.clip_direction:ClipDirection",
        "GANs: move pictures along the text's direction to its anchor",
        "SIGGRAPH 2022, arXiv 2108.00946",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.anchor_distillation:AnchorDistillation",
        "GANs: every picture of the concept learns a near one without it",
        "",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.latent_negation:LatentNegation",
        "GANs: take the concept's direction out of the latents",
        "AAAI 2024, arXiv 2303.05699",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.unit_ablation:UnitAblation",
        "GANs: zero the units that draw the concept, without training",
        "ICLR 2019, arXiv 1811.10597",
        (*_GANS, "Sites"),
        "none",
    ),
    Entry(
        "mmforget.methods.clip_repulsion:ClipRepulsion",
        "GANs: away from the text and nothing else, a baseline",
        "",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.adapt_then_unlearn:AdaptThenUnlearn",
        "GANs: away from weights that were adapted to the concept",
        "TMLR 2025, arXiv 2309.14054",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.parameter_extrapolation:ParameterExtrapolation",
        "GANs: step back from weights adapted to the concept",
        "TMLR 2025, arXiv 2309.14054",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.class_distillation:ClassDistillation",
        "GANs: a class learns to draw another one",
        "",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.class_rerouting:ClassRerouting",
        "GANs: replace the rows of a class; the weights still know it",
        "",
        _GANS,
        "none",
    ),
    Entry(
        "mmforget.methods.identity_unlearning:IdentityUnlearning",
        "GANs: move an identity, given by a picture, to another one",
        "CVPR 2024, arXiv 2405.09879",
        _GANS,
        "none",
    ),
    Entry("mmforget.methods.identity:Identity", "control: changes nothing", "", (), "none"),
    Entry(
        "mmforget.methods.answer_ban:AnswerBan",
        "control: never says the forgotten words",
        "",
        ("Answers",),
        "full",
    ),
    Entry(
        "mmforget.methods.answer_head:AnswerHead",
        "control: edits the layer that scores words and nothing below it",
        "",
        ("Answers", "HasLoss", "HasHead"),
        "fraction",
    ),
    Entry(
        "mmforget.methods.logit_mask:LogitMask",
        "control: hides the forgotten outputs",
        "",
        ("HasLogits", "HasHead"),
        "none",
    ),
    Entry(
        "mmforget.methods.head_only:HeadOnly",
        "control: edits the head and leaves the features as they are",
        "",
        ("HasLoss", "HasLogits", "HasHead"),
        "full",
    ),
)

METRICS = (
    Entry("mmforget.metrics.output:ClassAccuracy", "accuracy of each class"),
    Entry("mmforget.metrics.output:JSDivergence", "distance of the predictions to a reference"),
    Entry("mmforget.metrics.output:KLFromReference", "divergence of the predictions, in nats"),
    Entry("mmforget.metrics.output:ActivationDistance", "Euclidean distance of the probabilities"),
    Entry("mmforget.metrics.output:Agreement", "share of equal predictions of two models"),
    Entry("mmforget.metrics.output:ZRF", "likeness of the predictions to a random network's"),
    Entry("mmforget.metrics.representation:LinearCKA", "unbiased likeness of two representations"),
    Entry("mmforget.metrics.representation:KNNAccuracy", "accuracy of the nearest neighbours"),
    Entry("mmforget.metrics.membership:MembershipAUC", "can members be told from others?"),
    Entry("mmforget.metrics.summary:h_mean", "harmonic mean of what was kept and what was lost"),
    Entry("mmforget.metrics.summary:tug_of_war", "closeness to the retrained model on all splits"),
    Entry("mmforget.metrics.summary:average_gap", "mean difference to the retrained model"),
    Entry("mmforget.metrics.judge:ConceptRates", "how often a judge sees what was asked for"),
    Entry("mmforget.metrics.clip:CLIPScore", "agreement of pictures with their prompts"),
    Entry("mmforget.metrics.clip:ConceptProbability", "how sure a judge is to see a concept"),
    Entry("mmforget.metrics.distribution:FrechetDistance", "FID on a feature network of choice"),
    Entry("mmforget.metrics.distribution:KernelDistance", "KID, unbiased also for few pictures"),
    Entry("mmforget.metrics.perceptual:PerceptualDistance", "distance of pictures by layers"),
    Entry("mmforget.metrics.perceptual:PairedChange", "change of pictures at equal seeds"),
    Entry("mmforget.metrics.vacuous:VacuousCheck", "pictures that show nothing at all"),
    Entry("mmforget.metrics.copying:ReplicationRate", "share of prompts that bring a copy"),
    Entry("mmforget.metrics.copying:NormalisedCorrelation", "ncc: likeness of small pictures"),
    Entry("mmforget.metrics.copying:PixelDistance", "l2: largest difference of a patch"),
    Entry("mmforget.metrics.copying:DescriptorSimilarity", "likeness by a copy-detection network"),
    Entry(
        "mmforget.metrics.coverage:PrecisionRecall", "do pictures lie among those of a reference?"
    ),
    Entry("mmforget.metrics.coverage:DensityCoverage", "is every kind of picture still drawn?"),
    Entry("mmforget.metrics.token_cost:measured_latency", "time of tasks, measured in turns"),
    Entry(
        "mmforget.audit.visual_forgetting_curve:cut_answers",
        "how long does an answer need its picture?",
    ),
    Entry("mmforget.metrics.token_cost:DecoderShape", "operations and cache of visual tokens"),
    Entry("mmforget.metrics.answer_metrics:AttackSuccess", "answers that reveal what must go"),
    Entry("mmforget.metrics.answer_metrics:RefusalRate", "answers that begin with a refusal"),
    Entry(
        "mmforget.metrics.answer_metrics:SafeAnswerRefusal",
        "SARR: safe questions that are refused, or not answered rightly",
    ),
    Entry("mmforget.metrics.answer_metrics:Rouge", "words of an answer that are the right ones"),
    Entry("mmforget.metrics.answer_metrics:ExactMatch", "answers that are right word by word"),
    Entry("mmforget.metrics.answer_metrics:OptionAccuracy", "right letters, and answers without"),
    Entry("mmforget.metrics.truth_ratio:truth_ratio", "are wrong answers as likely as right ones?"),
    Entry("mmforget.metrics.truth_ratio:forget_quality", "KS test of truth ratios and retraining"),
    Entry("mmforget.metrics.modality:ModalityTable", "is a fact known by picture, text, or both?"),
    Entry("mmforget.metrics.continual:ScoreMatrix", "scores of every task after every task"),
    Entry(
        "mmforget.metrics.continual:forgetting_kinds",
        "is a fact forgotten, or only the format of the answer?",
    ),
    Entry("mmforget.metrics.visual_forgetting:VisualForgetting", "accuracy after the picture went"),
    Entry("mmforget.metrics.unlearning_degree:unlearning_degree", "how far scores have moved"),
    Entry("mmforget.metrics.detection:detection_scores", "can memorized prompts be told apart?"),
)

ATTACKS = (
    Entry("mmforget.attacks.relearning:relearn", "how fast a few samples bring the class back"),
    Entry(
        "mmforget.attacks.answer_relearning:relearn_answers",
        "how fast a few questions bring an entity back into answers",
    ),
    Entry("mmforget.attacks.probe:linear_probe", "is the class still in the features?"),
    Entry("mmforget.attacks.membership:transfer", "membership, learned on data that is known"),
    Entry(
        "mmforget.attacks.concept_inversion:inversion_attack",
        "concept_inversion: learn a word that brings the concept back",
        "ICLR 2024, arXiv 2308.01508",
    ),
    Entry(
        "mmforget.attacks.prompts:prompt_attack",
        "prompts: misspellings, translations, synonyms, prefixes, other seeds",
    ),
    Entry(
        "mmforget.attacks.adversarial_prompt:adversarial_prompt_attack",
        "adversarial_prompt: search for words in front of the prompt",
        "ECCV 2024, arXiv 2310.11868",
    ),
    Entry(
        "mmforget.attacks.image_side:sdedit_attack",
        "sdedit: finish a noisy picture of the concept",
    ),
    Entry(
        "mmforget.attacks.image_side:latent_inversion_attack",
        "latent_inversion: draw from the noise of a picture of the concept",
    ),
    Entry(
        "mmforget.attacks.embedding_inversion:embedding_attack",
        "search for prompt embeddings that bring memorized pictures back",
        "2025",
    ),
    Entry(
        "mmforget.attacks.latent_search:latent_search",
        "latent_search: a latent from which a GAN still draws the concept",
    ),
    Entry(
        "mmforget.attacks.mapper_attack:mapper_attack",
        "mapper: train a new edit towards the concept on the unlearned GAN",
    ),
    Entry(
        "mmforget.attacks.prompt_boundary:prompt_boundary",
        "prompt_boundary: edits towards texts that mean nearly the same",
    ),
    Entry(
        "mmforget.attacks.generator_inversion:generator_inversion",
        "inversion: can the GAN still draw given pictures of the concept?",
    ),
    Entry(
        "mmforget.attacks.generator_relearning:generator_relearning",
        "relearning: how fast a few pictures bring the concept back",
    ),
)

DETECTORS = (
    Entry(
        "mmforget.detection.noise_magnitude:noise_magnitude",
        "noise_magnitude: how far the text moves the predicted noise",
        "ICLR 2024, arXiv 2407.21720",
    ),
    Entry(
        "mmforget.detection.attention_entropy:attention_entropy",
        "attention_entropy: how widely attention is spread over the text",
        "arXiv 2403.11052",
    ),
    Entry(
        "mmforget.detection.sharpness:sharpness",
        "sharpness: how curved the probability is where pictures start",
        "arXiv 2412.04140",
    ),
    Entry(
        "mmforget.detection.seed_consistency:seed_consistency",
        "how many seeds give the same picture; needs pictures only",
        "arXiv 2301.13188",
    ),
    Entry(
        "mmforget.detection.token_attribution:token_attribution",
        "which words of a prompt bring a memory back",
        "ICLR 2024, arXiv 2407.21720",
    ),
)

MITIGATIONS = (
    Entry(
        "mmforget.mitigation.embedding_optimisation:EmbeddingOptimisation",
        "change the embedding of a prompt until it no longer looks memorized",
        "ICLR 2024, arXiv 2407.21720",
    ),
    Entry(
        "mmforget.mitigation.token_randomisation:TokenRandomisation",
        "insert random words or numbers into a prompt, or repeat its own",
        "arXiv 2305.20086",
    ),
    Entry(
        "mmforget.mitigation.token_randomisation:EmbeddingNoise",
        "add noise to the embedding of a prompt",
        "arXiv 2305.20086",
    ),
    Entry(
        "mmforget.mitigation.rejection_filter:RejectionFilter",
        "GANs: hold back pictures that show a concept; the weights stay as they are",
    ),
    Entry(
        "mmforget.mitigation.attention_reweighting:AttentionReweighting",
        "move attention from the end of a prompt to its beginning",
        "arXiv 2403.11052",
    ),
)
"""Ways to draw without what is not wanted; the weights stay as they are."""

RETENTION = (
    Entry(
        "mmforget.retention.fast_v:FastV",
        "visual tokens: drop those that the prompt does not attend to, between layers",
        "ECCV 2024, arXiv 2403.06764",
    ),
    Entry(
        "mmforget.retention.vision_zip:VisionZip",
        "visual tokens: keep what the vision tower looks at, merge the rest, before the layers",
        "CVPR 2025, arXiv 2412.04467",
    ),
    Entry(
        "mmforget.retention.token_pooling:PooledTokens",
        "visual tokens: average over the cells of a coarser grid, a baseline",
    ),
    Entry(
        "mmforget.retention.token_baselines:random_tokens",
        "visual tokens: keep some at random, a baseline",
    ),
    Entry(
        "mmforget.retention.token_baselines:grid_tokens",
        "visual tokens: keep evenly spaced ones, a baseline",
    ),
    Entry(
        "mmforget.retention.visual_features:ChosenTokens",
        "visual tokens: keep the highest by a score of yours, before the layers",
    ),
    Entry(
        "mmforget.retention.token_pruning:TokenPruner",
        "visual tokens: keep the highest by a score of yours, between layers",
    ),
    Entry(
        "mmforget.retention.remembering_model:RememberingLM",
        "visual tokens: read the tower's features again between layers (Vision Remember)",
        "arXiv 2506.03928",
    ),
    Entry(
        "mmforget.retention.take_along:TakeAlongLM",
        "visual tokens: train with the picture shown again within the answer (TVC)",
        "arXiv 2503.13360",
    ),
    Entry(
        "mmforget.retention.visual_calibration:PeriodicVisualCalibration",
        "visual tokens: answer with the picture shown again on the way (TVC)",
        "arXiv 2503.13360",
    ),
    Entry(
        "mmforget.retention.visual_heads:pruned_heads",
        "heads: silence those that follow the picture, or what is said without it (PH3)",
        "ACL 2024, arXiv 2402.18154",
    ),
    Entry(
        "mmforget.retention.reg_lora:RegLoRACallback",
        "tuning: hold the weights that earlier tasks have changed most (RegLoRA)",
        "ICML 2025, arXiv 2505.02486",
    ),
    Entry(
        "mmforget.retention.lines:LiNeS",
        "tuning: scale what was trained by depth, or merge what several tasks have trained",
        "ICLR 2025, arXiv 2410.17146",
    ),
)
"""Ways to spare visual tokens of multimodal language models, and ways to keep what they showed."""

CATALOGUE: dict[str, tuple[Entry, ...]] = {
    "models": MODELS,
    "data": DATA,
    "methods": METHODS,
    "metrics": METRICS,
    "attacks": ATTACKS,
    "detectors": DETECTORS,
    "mitigations": MITIGATIONS,
    "retention": RETENTION,
}


def fits(method: Entry, model: Entry) -> bool:
    """Whether the model offers what the method needs, and its data what the method reads."""
    # methods that are steered by prompts or latents bring their own data
    own = bool({"TextConditioned", "HasLatents"} & set(method.capabilities))
    readable = own or method.reads == "none" or model.samples == "labels"
    return readable and set(method.capabilities) <= set(model.capabilities)
