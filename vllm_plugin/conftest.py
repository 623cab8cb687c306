"""Without vLLM the tests of the plugin are skipped; this says so in the last lines of a run, -rs or not."""
import importlib.util


def pytest_terminal_summary(terminalreporter):
    if importlib.util.find_spec("vllm") is None:
        terminalreporter.write_line("vllm_plugin: its tests were not run, vLLM is not installed here "
                                    "(vllm_plugin/README.md)")
