#pragma once
// What another program took, beside what it did.

#include <cstdint>
#include <sstream>

#include "support/subprocess.h"

namespace qcow::test {

struct Measured {
    Finished finished;
    double processor_seconds = 0;  ///< so that a busy machine does not matter
    std::uint64_t peak_bytes = 0;  ///< resident
};

/// Runs a program to its end. A small one starts it: the kernel counts what a parent has resident at that moment as its
/// child's, and a test may have much.
inline Measured run_measured(std::vector<std::string> argv, const std::filesystem::path& directory = {}) {
    const std::string parent = R"(
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=sys.stderr)
sys.exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
)";
    argv.insert(argv.begin(), {"python3", "-c", parent});
    Measured result{run(argv, directory)};
    auto& err = result.finished.err;
    const auto last = err.rfind('\n', err.size() - 2) + 1;  // 0 where there is no other line
    std::uint64_t kibibytes = 0;
    if (!(std::istringstream(err.substr(last)) >> result.processor_seconds >> kibibytes))
        throw std::runtime_error("not measured: " + result.finished.text());
    result.peak_bytes = kibibytes * 1024;
    err.erase(last);
    return result;
}

}  // namespace qcow::test
