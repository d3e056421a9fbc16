#pragma once

#include <array>
#include <csignal>

namespace tool {

/// While this lives, SIGINT, SIGTERM and SIGHUP clean up before they end the process: they remove new files that are
/// not complete, and name the files that they leave incomplete. Signals that are ignored stay ignored.
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
