"""What users of neighbouring projects reported, kind by kind, and the tests that hold each kind here.

Numbers are those of the reports in the other projects' trackers. A test below is a function of that name, anywhere in
the tests; this file fails where one is renamed or taken away.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

SILENTLY_WRONG = {
    "packed rows leak where layers carry state and get a mask too (axolotl 3572, unsloth 7249, transformers 46588)": (
        "test_the_layer_that_leaks_is_named_though_it_is_given_a_mask",
        "test_a_model_that_cannot_keep_packed_rows_apart",
    ),
    "a row of CSV or TSV with more or fewer fields than the header (pandas 15203)": (
        "test_a_row_with_more_or_fewer_fields_than_columns_is_named",
    ),
    "arguments of tool calls as JSON text (mlx-examples 1053)": (
        "test_arguments_as_text_are_those_of_an_object_however_a_template_writes_them",
        "test_a_call_without_arguments_has_none",
    ),
    "nulls that Arrow fills into objects (ms-swift 6467)": (
        "test_nulls_that_a_table_fills_in_are_not_there",
        "test_nulls_that_are_meant_stay",
    ),
    "turns and rows marked not to be learned (axolotl 1702)": (
        "test_turns_that_are_marked_are_not_learned",
        "test_rows_that_are_marked_are_dropped_and_counted",
        "test_marks_that_cannot_be_followed_are_refused",
        "test_a_mark_on_a_turn_that_is_not_the_assistants",
    ),
    "history, labels and other fields of a row (LLaMA-Factory 3351, trl 1116)": (
        "test_history_system_and_tools_are_read_wherever_they_are",
        "test_what_would_mean_something_else_is_refused_by_name",
        "test_preferences_are_named",
        "test_fields_that_nothing_reads_are_named",
    ),
    "text that begins with the token that the tokenizer adds (trl 1400)": (
        "test_text_that_begins_with_the_first_token_has_it_once_and_never_as_a_target",
    ),
    "a generation prompt that ends inside a token of the answer (trl 5213)": (
        "test_tokens_are_cut_where_the_prompt_of_chat_ends",
        "test_every_prompt_of_a_conversation_is_cut",
        "test_a_prompt_without_template_is_cut_as_it_will_be_asked",
    ),
    "a file of weights beside an index of others (diffusers 14719)": (
        "test_the_files_that_transformers_takes_or_none",
        "test_an_index_beside_a_single_file_is_named",
    ),
    "paths with ~ and variables": ("test_every_setting_that_is_a_path", "test_what_is_not_set_is_named"),
}
TRACEBACKS = {
    "dynamic rope": ("test_dynamic_rope_is_planned_and_trained", "test_dynamic_rope_has_plain_gradients"),
    "a dry run that fails": ("test_what_cannot_be_run_without_memory_is_measured",),
    "output_router_logits in a configuration": (
        "test_a_router_loss_is_refused_by_name",
        "test_a_mixture_is_trained_without_its_router_loss",
        "test_outputs_a_configuration_asks_for_change_nothing",
    ),
    "layers that return more than one thing": ("test_layers_that_return_several_things",),
    "half a surrogate pair": ("test_half_a_surrogate_pair_anywhere_is_named",),
    "PYTHONOPTIMIZE": ("test_from_a_plan_to_a_merged_model", "test_children_run_without_asserts_and_tests_with_them"),
    "output that is not UTF-8": ("test_output_that_has_not_all_characters", "test_what_does_not_fit_is_replaced"),
    "device: auto": ("test_auto_is_a_device",),
}
LATE_UNCLEAR_MISSING = {
    "tokens, padding and lengths beyond the model, before the start": (
        "test_tokens_outside_the_vocabulary",
        "test_padding_beyond_the_embedding_is_another_token",
        "test_settings",
        "test_a_bad_row_that_no_sample_meets",
    ),
    "eval_strategy: no": ("test_words_that_yaml_takes_for_false",),
    "a template that ends the whole text with an end token": ("test_an_end_token_of_the_whole_text_is_no_rewriting",),
    "templates of R1, V3.1, Nemotron 3 and others; their variables": (
        "test_stock_templates",
        "test_what_is_learned_is_shown",
        "test_variables_reach_the_template_and_stay_with_the_tokenizer",
        "test_variables_in_a_runs_file_and_on_the_command_line",
    ),
    "parts of content, function_call, functions": (
        "test_parts_of_content_are_joined",
        "test_calls_in_sharegpt_and_what_tools_answer",
        "test_schemas_are_one_form",
    ),
    "lema adapter check and lema export agree, and no advice costs the only copy": (
        "test_check_and_export_give_the_same_answer",
    ),
    "codes without quantization_config; adapters and runs given as a model": (
        "test_codes_without_a_quantization_config_are_named",
        "test_mlx_is_named_by_its_configuration",
        "test_folders_that_are_no_model_are_named",
        "test_the_file_of_an_adapter_is_named",
    ),
    "targets as patterns and comma lists; exclude_modules": (
        "test_patterns_and_exclusions_reach_peft",
        "test_lists_with_commas",
    ),
    "going on with more steps, with rows cut otherwise, from an adapter": (
        "test_more_steps_after_the_end",
        "test_rows_cut_otherwise_give_the_same_numbers",
        "test_an_adapter_is_trained_further",
        "test_an_adapter_of_the_hub",
    ),
    "settings that other tools give another meaning": ("test_what_others_mean_otherwise_is_said",),
    "bad rows skipped by choice; field names; standard input; patterns": (
        "test_bad_rows_are_skipped_counted_and_reported",
        "test_too_many_bad_rows_stop_the_run",
        "test_fields_under_other_names",
        "test_standard_input",
        "test_a_pattern_is_all_files_that_fit",
    ),
    "a row of 20 MB, a file of 1 GB, a conversation of thousands of turns": (
        "test_a_row_of_20_mb_costs_what_its_kept_tokens_cost",
        "test_a_million_rows_in_a_gigabyte_are_there_at_once",
        "test_what_turns_cost_grows_as_their_number",
    ),
    "warnings of libraries": ("test_a_model_is_planned_trained_asked_and_merged",),
}
SHOWN_BESIDES = {
    "code of strangers": (
        "test_every_call_that_could_run_code_says_that_it_does_not",
        "test_code_beside_a_model_and_its_tokenizer_is_named_and_not_run",
        "test_a_yes_on_standard_input_runs_nothing",
    ),
    "signals at every line": (
        "test_signals_at_every_line_of_the_way_out",
        "test_a_third_signal_at_one_line_of_the_way_out",
        "test_the_second_signal_at_any_line_of_a_step",
        "test_ctrl_c_in_an_answer_of_the_bare_model_leaves_it_usable",
    ),
    "raw errors of files and templates": (
        "test_hostile_files",
        "test_an_adapter_that_is_spoilt",
        "test_what_a_template_does_wrong_is_said",
        "test_a_template_that_does_not_end_is_stopped",
        "test_a_text_of_gigabytes_is_refused",
        "test_the_table_of_errors_is_true",
    ),
    "pipes and devices": (
        "test_pipes_and_devices_are_refused_at_once",
        "test_only_a_regular_file_is_read_as_a_template",
        "test_pipes_and_devices_in_a_models_folder_are_not_read",
        "test_a_fifo_does_not_block",
    ),
    "folders that killed runs leave": (
        "test_nothing_of_a_run_is_in_the_temporary_folder",
        "test_what_a_killed_run_left_is_cleared_at_the_next_start",
    ),
    "steps from two threads, and without autograd": (
        "test_a_second_thread_gets_one_error_and_disturbs_nothing",
        "test_many_threads_that_step_at_once",
        "test_a_step_without_autograd_says_so",
        "test_a_model_made_under_inference_mode_says_so",
    ),
    "files that the safetensors library takes": ("test_the_library_agrees", "test_hostile_header"),
    "trainers of transformers and TRL": (
        "test_transformers_trainer_saves_what_plain_peft_does",
        "test_transformers_trainer_goes_on_from_its_checkpoint",
        "test_trl_trains_saves_and_goes_on",
    ),
    "where answers end, which weights and which template": (
        "test_answers_end_where_the_models_generation_config_says",
        "test_an_answer_ends_where_the_template_ends_a_turn",
        "test_of_several_named_templates_the_one_transformers_takes",
    ),
    "rows from compressed files, data sets by name and frames": (
        "test_compressed_files_are_the_same_rows",
        "test_data_sets_by_name",
        "test_pandas_frames",
        "test_polars_frames",
    ),
    "an error is a message, and a traceback on request": (
        "test_an_error_is_a_message_and_a_traceback_on_request",
        "test_what_nobody_foresaw_is_one_message_too",
    ),
    "files of six other tools": ("test_from_another_tools_file_to_an_adapter",),
    "hints that would install somebody else's package": (
        "test_hints_name_libraries_with_the_bounds_that_are_declared",
        "test_no_hint_installs_a_package_of_somebody_else",
    ),
}
ALL = {**SILENTLY_WRONG, **TRACEBACKS, **LATE_UNCLEAR_MISSING, **SHOWN_BESIDES}


@pytest.fixture(scope="module")
def there() -> set[str]:
    """Names of all tests."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.rglob("test_*.py"))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("kind", ALL)
def test_each_kind_of_report_is_held_by_a_test(kind: str, there: set[str]) -> None:
    assert ALL[kind] and {*ALL[kind]} <= there, {*ALL[kind]} - there
