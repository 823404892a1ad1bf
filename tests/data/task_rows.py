"""One hub row of each task, written by hand, with what a decoder must read and say.

The words are those of the data sets' own papers, not of the task files: label 0 of RTE is
entailment, of WNLI not entailment, of QNLI "holds the answer", of SuperGLUE's CB entailment,
contradiction, neutral, of MNLI entailment, neutral, contradiction.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

# task: (row as the hub has it, the whole prompt, the completion)
HUB: dict[str, tuple[Row, str, str]] = {
    "glue/cola": (
        {"sentence": "Him sleep the.", "label": 0, "idx": 0},
        "Him sleep the.\nQuestion: Does this sentence make sense?\nAnswer:",
        " no",
    ),
    "glue/sst2": (
        {"sentence": "a dull mess ", "label": 0, "idx": 0},
        "a dull mess\nQuestion: Is this sentence positive or negative?\nAnswer:",
        " negative",
    ),
    "glue/mrpc": (
        {"sentence1": "He left .", "sentence2": "He went away .", "label": 1, "idx": 0},
        "Sentence 1: He left .\nSentence 2: He went away .\n"
        "Question: Do both sentences mean the same thing?\nAnswer:",
        " yes",
    ),
    "glue/stsb": (
        {"sentence1": "A dog runs.", "sentence2": "A cat runs.", "label": 2.799999952316284},
        "Sentence 1: A dog runs.\nSentence 2: A cat runs.\n"
        "Question: How similar are the two sentences, from 0 to 5?\nAnswer:",
        " 2.8",
    ),
    "glue/qqp": (
        {"question1": "How tall is it?", "question2": "Is it tall?", "label": 0, "idx": 0},
        "Question 1: How tall is it?\nQuestion 2: Is it tall?\n"
        "Question: Do both questions ask the same thing?\nAnswer:",
        " no",
    ),
    "glue/mnli": (
        {"premise": "Two dogs run.", "hypothesis": "Cats sleep.", "label": 2, "idx": 0},
        "Two dogs run.\nQuestion: Cats sleep. True, False or Neither?\nAnswer:",
        " False",
    ),
    "glue/qnli": (
        {"question": "Who was first?", "sentence": "Ann was first.", "label": 0, "idx": 0},
        "Who was first?\nAnn was first.\n"
        "Question: Does this response answer the question?\nAnswer:",
        " yes",
    ),
    "glue/rte": (
        {"sentence1": "Ann and Bo came.", "sentence2": "Ann came.", "label": 0, "idx": 0},
        "Ann and Bo came.\nQuestion: Ann came. True or False?\nAnswer:",
        " True",
    ),
    "glue/wnli": (
        {"sentence1": "The cup hit the bowl; it fell.", "sentence2": "The bowl fell.", "label": 0},
        "The cup hit the bowl; it fell.\nQuestion: The bowl fell. True or False?\nAnswer:",
        " False",
    ),
    "super_glue/boolq": (
        {"question": "is ice cold", "passage": "Ice -- Ice is frozen.", "idx": 0, "label": 1},
        "Ice -- Ice is frozen.\nQuestion: is ice cold?\nAnswer:",
        " yes",
    ),
    "super_glue/cb": (
        {"premise": "I doubt that it rains.", "hypothesis": "it rains", "idx": 0, "label": 1},
        "I doubt that it rains.\nQuestion: it rains. True, False or Neither?\nAnswer:",
        " False",
    ),
    "super_glue/copa": (
        {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "He sang.",
         "question": "effect", "idx": 0, "label": 0},
        "The cup fell therefore",
        " it broke.",
    ),
    "super_glue/multirc": (
        {"paragraph": "Sam swam. ", "question": "Who swam?", "answer": "Tom",
         "idx": {"paragraph": 4, "question": 7, "answer": 9}, "label": 0},
        "Sam swam.\nQuestion: Who swam?\nCandidate answer: Tom\n"
        "Question: Is the candidate answer correct?\nAnswer:",
        " no",
    ),
    "super_glue/record": (
        {"passage": "Ann met Bo.\n@highlight\nThey met", "query": "@placeholder met Bo there",
         "entities": ["Bo", "Ann"], "entity_spans": {}, "answers": ["Ann"],
         "idx": {"passage": 3, "query": 5}},
        "Ann met Bo.\n- They met\nFill the gap: ____ met Bo there\nAnswer:",
        " Ann",
    ),
    "super_glue/rte": (
        {"premise": "Ann came.", "hypothesis": "Bo came.", "idx": 0, "label": 1},
        "Ann came.\nQuestion: Bo came. True or False?\nAnswer:",
        " False",
    ),
    "super_glue/wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank pays.", "label": 0,
         "start1": 8, "start2": 4, "end1": 12, "end2": 8, "idx": 0},
        'Sentence 1: A river bank.\nSentence 2: The bank pays.\nQuestion: Is the word "bank" '
        "used in the same way in both sentences?\nAnswer:",
        " no",
    ),
    "super_glue/wsc": (
        {"text": "Ann thanked Bo: she was glad.", "span1_index": 0, "span2_index": 3,
         "span1_text": "Ann", "span2_text": "she", "idx": 0, "label": 1},
        'Ann thanked Bo: she was glad.\nQuestion: In this text, does "she" refer to "Ann"?\n'
        "Answer:",
        " yes",
    ),
    "cl15/yelp": (
        {"label": 0, "text": "Awful."},
        "What is the sentiment of the following paragraph? Choose one from the option.\nOption: "
        "very negative, negative, neutral, positive, very positive\nText: Awful.\nAnswer:",
        " very negative",
    ),
    "cl15/amazon": (
        {"id": "en_1", "label": 4, "text": "Great.", "label_text": "4"},
        "What is the sentiment of the following paragraph? Choose one from the option.\nOption: "
        "very negative, negative, neutral, positive, very positive\nText: Great.\nAnswer:",
        " very positive",
    ),
    "cl15/mnli": (
        {"premise": "Dogs run.", "hypothesis": "Dogs move.", "label": 0, "idx": 0},
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose '
        "one from the option.\nOption: neutral, entailment, contradiction\n"
        "sentence 1: Dogs run.\nsentence 2: Dogs move.\nAnswer:",
        " entailment",
    ),
    "cl15/cb": (
        {"premise": "Maybe it rains.", "hypothesis": "it rains", "idx": 0, "label": 2},
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose '
        "one from the option.\nOption: entailment, contradiction, neutral\n"
        "sentence 1: Maybe it rains.\nsentence 2: it rains\nAnswer:",
        " neutral",
    ),
    "cl15/copa": (
        {"premise": "The cup fell.", "choice1": "He sang.", "choice2": "It broke.",
         "question": "effect", "idx": 0, "label": 1},
        'Which sentence is the effect of "The cup fell."? Choose one between A and B.\n'
        "A: He sang.\nB: It broke.\nAnswer:",
        " B",
    ),
    "cl15/qqp": (
        {"question1": "How old?", "question2": "What age?", "label": 1, "idx": 0},
        'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one '
        "from the option.\nOption: False, True\nfirst sentence: How old?\n"
        "second sentence: What age?\nAnswer:",
        " True",
    ),
    "cl15/rte": (
        {"premise": "Ann came.", "hypothesis": "Bo came.", "idx": 0, "label": 1},
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose '
        "one from the option.\nOption: contradiction, entailment\n"
        "sentence 1: Ann came.\nsentence 2: Bo came.\nAnswer:",
        " contradiction",
    ),
    "cl15/imdb": (
        {"text": "A waste of time.", "label": 0},
        "What is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: Good, Bad\nA waste of time.\nAnswer:",
        " Bad",
    ),
    "cl15/sst2": (
        {"sentence": "a delight ", "label": 1, "idx": 0},
        "What is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: Good, Bad\nText: a delight\nAnswer:",
        " Good",
    ),
    "cl15/dbpedia": (
        {"label": 5, "title": "HMS Ann", "content": " HMS Ann was a ship."},
        "What is the topic of the following paragraph? Choose one from the option.\nOption: "
        "Company, Educational Institution, Artist, Athlete, Office Holder, Mean of "
        "Transportation, Building, Natural Place, Village, Animal, Plant, Album, Film, Written "
        "Work\nTitle: HMS Ann\nText:  HMS Ann was a ship.\nAnswer:",
        " Mean of Transportation",
    ),
    "cl15/agnews": (
        {"text": "Shares rose.", "label": 2},
        "What is the topic of the following paragraph? Choose one from the option.\nOption: "
        "World, Sports, Business, Science or Technology\nText: Shares rose.\nAnswer:",
        " Business",
    ),
    "cl15/yahoo": (
        {"id": 0, "topic": 2, "question_title": "Cold?", "question_content": "I cough.",
         "best_answer": "Rest."},
        "What is the topic of the following paragraph? Choose one from the option.\nOption: "
        "Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & "
        "Internet, Sports, Business & Finance, Entertainment & Music, Family & Relationships, "
        "Politics & Government\nTitle: Cold?\nText: I cough. Rest.\nAnswer:",
        " Health",
    ),
    "cl15/multirc": (
        {"paragraph": "Sam swam.", "question": "Who swam?", "answer": "Sam",
         "idx": {"paragraph": 0, "question": 0, "answer": 0}, "label": 1},
        "According to the following passage and question, is the candidate answer true or false? "
        "Choose one from the option.\nOption: False, True\nparagraph: Sam swam.\n"
        "question: Who swam?\ncandidate answer: Sam\nAnswer:",
        " True",
    ),
    "cl15/boolqa": (
        {"question": "is ice hot", "passage": "Ice is cold.", "idx": 0, "label": 0},
        "According to the following passage, is the question true or false? Choose one from the "
        "option.\nOption: True, False\nquestion: is ice hot\npassage: Ice is cold.\nAnswer:",
        " False",
    ),
    "cl15/wic": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": 1, "idx": 0},
        "Given a word and two sentences, whether the word is used with the same sense in both "
        "sentence? Choose one from the option.\nOption: True, False\nword: bank\nA bank.\n"
        "The bank.\nAnswer:",
        " True",
    ),
    "gsm8k": (
        {"question": "One and one?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
        "Question: One and one?\nAnswer:",
        " 1+1=<<1+1=2>>2\n#### 2",
    ),
    "arc_easy": (
        {"id": "x", "question": "What is wet?", "answerKey": "2",
         "choices": {"text": ["fire", "water", "sand"], "label": ["1", "2", "3"]}},
        "Question: What is wet?\nAnswer:",
        " water",
    ),
    "arc_challenge": (
        {"id": "x", "question": "What is wet?", "answerKey": "D",
         "choices": {"text": ["a", "b", "c", "rain"], "label": ["A", "B", "C", "D"]}},
        "Question: What is wet?\nAnswer:",
        " rain",
    ),
    "hellaswag": (
        {"ind": 1, "activity_label": "Baking", "ctx_a": "A cake [header] is  made.",
         "ctx_b": "the Man", "ctx": "A cake [header] is made. the Man", "label": "1",
         "endings": ["sings.", "eats [step] it. [title] Done", "a", "b"]},
        "Baking: A cake is made. The man",
        " eats it.. Done",
    ),
    "winogrande": (
        {"sentence": "Ann beat Bo, so _ won the cup.", "option1": "Bo", "option2": "Ann",
         "answer": "2"},
        "Ann beat Bo, so",
        " Ann won the cup.",
    ),
}  # fmt: skip
