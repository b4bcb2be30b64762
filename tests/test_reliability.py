"""Which tests hold each fault and bad input that the project answers for; a row without a test fails here."""

import ast
from pathlib import Path

import pytest

ROWS: dict[str, tuple[str, ...]] = {
    "truncated file, Git-LFS pointer, HTML saved as .pth": (
        "test_checkpoint.py::test_bad_file",
        "test_checkpoint.py::test_own_format_bad_files",
        "test_export_cli.py::test_a_bad_checkpoint_is_one_line",
    ),
    "hostile pickle": ("test_checkpoint.py::test_bad_file",),
    "damaged manifest, configuration or checkpoint, whatever the damage": (
        "test_bundle.py::test_a_damaged_manifest_is_one_clear_error",
        "fuzz/test_fuzz.py::test_thirty_seconds_of_damaged_files_give_only_this_projects_errors",
    ),
    "missing, extra, renamed keys; wrong shapes; NaN or infinite weights": (
        "test_checkpoint.py::test_weights_that_do_not_fit",
        "test_checkpoint.py::test_wrong_backbone_weights",
    ),
    "typo in a configuration, unknown key": (
        "test_checkpoint.py::test_contradicting_configuration",
        "test_checkpoint.py::test_own_format_json_is_checked",
        "test_bundle.py::test_an_unknown_key_names_the_nearest",
        "test_export_cli.py::test_a_wrong_option_is_one_line_before_any_work",
    ),
    "class not in the model; class given to an unconditional model": (
        "test_detector.py::test_wrong_classes",
        "test_detector.py::test_unconditional_model_refuses_classes",
    ),
    "ONNX external data outside the folder, link, past the end": (
        "test_onnx.py::test_external_data_that_lead_elsewhere_are_refused_before_they_are_read",
        "test_onnx.py::test_linked_and_truncated_external_data_are_refused",
        "test_onnxruntime.py::test_external_tensors_are_those_that_the_onnx_package_finds",
        "test_onnxruntime.py::test_hostile_bytes_are_refused",
    ),
    "a package of another extra is not installed": (
        "test_detector.py::test_a_missing_package_is_named_with_the_extra_that_has_it",
        "test_layering.py::test_what_needs_an_extra_says_which_in_one_line",
    ),
    "bundle file with a name that leads outside, a link": (
        "test_bundle.py::test_names_that_could_lead_outside_are_refused",
        "test_bundle.py::test_links_are_refused_even_to_the_same_content",
    ),
    "operator or opset not supported": (
        "test_tensorrt.py::test_an_operator_that_the_library_does_not_know_is_named_with_its_node",
        "test_export.py::test_an_opset_that_is_not_supported_is_that_formats_failure",
    ),
    "parity check failed after export": (
        "test_export.py::test_a_failing_format_is_rejected_and_the_others_are_published",
        "test_export.py::test_a_failing_format_that_the_old_bundle_has_leaves_the_old_bundle",
        "test_export_cli.py::test_a_failing_format_gives_exit_code_1_and_keeps_the_rest",
    ),
    "engine of another GPU or library version": (
        "test_tensorrt.py::test_engines_of_another_version_or_gpu_are_refused_with_the_command_that_rebuilds_them",
        "test_aoti.py::test_package_for_something_else_is_refused",
        "test_bundle.py::test_another_schema_version",
    ),
    "engine or weight file altered by one byte": (
        "test_bundle.py::test_one_altered_byte_is_a_hash_mismatch",
        "test_export.py::test_an_altered_engine_is_refused_before_it_is_parsed",
        "test_export_cli.py::test_verify_finds_one_altered_byte",
    ),
    "disk full": (
        "test_bundle.py::test_a_full_disk_leaves_the_old_bundle_and_nothing_else",
        "test_bundle.py::test_replacing_the_manifest_survives_a_crash_in_the_middle",
        "test_export.py::test_a_full_disk_in_the_middle_leaves_the_old_bundle",
    ),
    "SIGKILL or power cut in the middle of an export": (
        "test_export.py::test_kill_9_at_ten_random_moments_never_damages_the_bundle",
        "test_bundle.py::test_a_crash_between_the_two_renames_is_repaired_by_the_next_export",
        "test_bundle.py::test_a_crash_after_the_exchange_keeps_the_new_bundle",
    ),
    "Ctrl-C in the middle of an export": ("test_export_cli.py::test_ctrl_c_leaves_nothing_behind",),
    "two exporters on one target; a reader meanwhile": (
        "test_bundle.py::test_a_second_exporter_is_locked_out_until_the_first_ends",
        "test_export.py::test_a_bundle_that_is_replaced_while_it_is_loaded_is_not_mixed",
    ),
    "GPU out of memory at batch N": (
        "test_cudagraph.py::test_a_batch_that_does_not_fit_is_split_in_order_and_the_size_remembered",
        "test_cudagraph.py::test_a_bucket_without_memory_is_left_out_with_a_warning",
    ),
    "no GPU, driver or library missing": (
        "test_detector.py::test_devices",
        "test_cudagraph.py::test_without_a_gpu_the_engine_says_what_it_needs",
        "test_tensorrt.py::test_a_missing_library_says_how_to_install_it",
        "test_onnx.py::test_providers_that_are_not_installed_are_named_never_replaced",
        "test_aoti.py::test_without_a_compiler",
    ),
    "wrong size, channels, dtype, layout": (
        "test_detector.py::test_refused_frames_say_how_to_convert",
        "test_detector.py::test_fixed_frame_size",
    ),
    "NaN in a float frame; black, saturated, frozen frame": (
        "test_detector.py::test_refused_frames_say_how_to_convert",
        "test_detector.py::test_frames_that_show_nothing_get_no_verdict",
        "test_detector.py::test_a_map_that_is_not_finite_gets_no_verdict",
        "test_detector.py::test_frozen_camera",
        "test_decision.py::test_frames_that_cannot_be_judged",
    ),
    "strided, non-contiguous, read-only, big-endian arrays": (
        "test_detector.py::test_memory_layout_changes_nothing",
        "test_detector.py::test_read_only_frames",
    ),
    "bad image files in a folder": (
        "test_inspect.py::test_one_row_a_file_with_the_detectors_verdict",
        "test_inspect.py::test_frames_that_the_detector_refuses_are_error_rows",
        "test_inspect.py::test_a_stopped_job_leaves_a_whole_file_and_goes_on",
    ),
    "batch of 0; batch above the largest bucket": (
        "test_detector.py::test_empty_batch",
        "test_cudagraph.py::test_a_batch_is_cut_into_pieces_that_buckets_hold",
        "test_tensorrt.py::test_batches_are_split_and_padded_to_the_profile",
    ),
    "many threads on one detector; call during close": (
        "test_detector.py::test_many_threads_on_one_detector",
        "test_detector.py::test_close_lets_calls_in_flight_finish",
        "test_onnx.py::test_one_engine_serves_many_threads",
        "test_aoti.py::test_package_from_many_threads",
        "test_cudagraph.py::test_many_threads_take_turns",
    ),
    "caller reuses its frame buffer": ("test_detector.py::test_frames_are_never_written_and_may_be_reused",),
    "uncalibrated model asked for a verdict": (
        "test_detector.py::test_no_calibration_no_verdict",
        "test_export.py::test_diff_plus_sum_has_a_score_only_once_calibrated",
    ),
    "too few or contaminated good parts; a threshold that is not finite": (
        "test_decision.py::test_parts_needed_is_the_smallest_number_with_a_finite_threshold",
        "test_decision.py::test_a_contaminated_set_is_warned_about_by_name",
        "test_export.py::test_bad_good_parts_are_refused_before_anything_is_built",
        "test_export_cli.py::test_defective_calibration_parts_are_warned_about",
        "test_bundle.py::test_a_threshold_that_is_not_finite_is_refused",
    ),
    "a detector in a forked child, or pickled": (
        "test_service_environment.py::test_fork_after_load_is_one_error_at_once_for_every_engine",
        "test_service_environment.py::test_a_detector_that_is_pickled_says_what_to_send",
    ),
    "a user without a name, a bundle that cannot be written": (
        "test_service_environment.py::test_user_without_a_name_and_home_runs_an_onnx_bundle_without_timm",
        "test_service_environment.py::test_a_read_only_bundle_is_refused_before_it_is_locked",
    ),
    "a day of calls": ("test_detector.py::test_memory_stays_flat",),
}
"""Not built yet, so not here: exchange of a running bundle, a bounded queue with deadlines."""


@pytest.mark.parametrize("row", ROWS)
def test_the_row_has_its_tests(row: str) -> None:
    for name in ROWS[row]:
        file, _, function = name.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body), name
