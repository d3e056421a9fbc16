#include "signals.h"

#include <unistd.h>

#include <cstring>

#include "qcow/storage.h"

namespace tool {
namespace {

constexpr std::array ending_signals = {SIGINT, SIGTERM, SIGHUP};

// Called in a signal handler: system calls only.

void say(const char* text) {
    const auto written = write(STDERR_FILENO, text, std::strlen(text));
    static_cast<void>(written);
}

void say_incomplete(const char* path, qcow::Incomplete what) {
    const char* consequence = what == qcow::Incomplete::written_in_place
                                  ? "was written in place and is incomplete; its earlier contents are gone"
                                  : "holds only a part of the source";
    for (const char* text : {"qcow: ", path, ": ", consequence, "\n"}) say(text);
}

void clean_up_and_end(int signal) {
    qcow::abandon_new_files(say_incomplete);
    std::signal(signal, SIG_DFL);
    raise(signal);
}

}  // namespace

CleanUpOnSignals::CleanUpOnSignals() {
    struct sigaction action = {};
    action.sa_handler = clean_up_and_end;
    for (const int signal : ending_signals) sigaddset(&action.sa_mask, signal);
    for (std::size_t i = 0; i < ending_signals.size(); ++i) {
        sigaction(ending_signals[i], nullptr, &before_[i]);
        if (before_[i].sa_handler == SIG_DFL) sigaction(ending_signals[i], &action, nullptr);
    }
}

CleanUpOnSignals::~CleanUpOnSignals() {
    for (std::size_t i = 0; i < ending_signals.size(); ++i) sigaction(ending_signals[i], &before_[i], nullptr);
}

}  // namespace tool
