#pragma once

#include <array>
#include <csignal>

namespace tool {

/// As long as this lives, SIGINT, SIGTERM and SIGHUP clean up before they end the process: nothing of a new file is
/// left, and what is incomplete is said to be so. Signals that are ignored stay so.
class CleanUpOnSignals {
public:
    CleanUpOnSignals();
    CleanUpOnSignals(const CleanUpOnSignals&) = delete;
    CleanUpOnSignals& operator=(const CleanUpOnSignals&) = delete;
    ~CleanUpOnSignals();

private:
    std::array<struct sigaction, 3> before_ = {};
};

}  // namespace tool
