#pragma once

#include <array>
#include <csignal>
#include <stop_token>
#include <thread>

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

/// While this lives, the first SIGINT, SIGTERM or SIGHUP requests a stop, so that the image that is being changed is
/// closed in order. The process then ends by that signal, when this goes. A second signal ends it at once. Signals that
/// are ignored stay ignored. To be made before other threads are.
class StopOnSignals {
public:
    StopOnSignals();
    StopOnSignals(const StopOnSignals&) = delete;
    StopOnSignals& operator=(const StopOnSignals&) = delete;
    ~StopOnSignals();

    [[nodiscard]] std::stop_token token() const { return stop_.get_token(); }

private:
    void wait();

    sigset_t signals_ = {};
    sigset_t before_ = {};
    std::stop_source stop_;
    int caught_ = 0;
    std::thread waiting_;
};

/// While this lives, a terminal does not show what is typed. The signals that end the process first bring it back to
/// what it was, also where StopOnSignals lives: nothing is being changed while somebody is asked. A process that is
/// stopped hides again what is typed when it goes on. One at a time.
class SilentTerminal {
public:
    explicit SilentTerminal(int terminal);
    SilentTerminal(const SilentTerminal&) = delete;
    SilentTerminal& operator=(const SilentTerminal&) = delete;
    ~SilentTerminal();

    /// Whether it is a terminal at all.
    [[nodiscard]] bool works() const { return works_; }

private:
    bool works_ = false;
    std::array<struct sigaction, 3> before_ = {};
    struct sigaction before_continuing_ = {};
    sigset_t mask_ = {};
};

}  // namespace tool
