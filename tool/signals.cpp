#include "signals.h"

#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "qcow/storage.h"

namespace tool {
namespace {

constexpr std::array ending_signals = {SIGINT, SIGTERM, SIGHUP};
/// Sent to the thread that waits for those. Nobody else sends it, and it is ignored where it is not waited for.
constexpr int end_of_waiting = SIGURG;

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

constexpr int none = -1;
std::atomic<int> silent_terminal = none;
termios shown_terminal = {};  // written before silent_terminal is
termios hidden_terminal = {};

void show_terminal() { tcsetattr(silent_terminal, TCSAFLUSH, &shown_terminal); }

/// Whoever stopped the process may have shown the terminal meanwhile. (What was typed before stays.)
void hide_again(int) { tcsetattr(silent_terminal, TCSANOW, &hidden_terminal); }

void show_and_end(int signal) {
    show_terminal();
    std::signal(signal, SIG_DFL);
    raise(signal);
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

StopOnSignals::StopOnSignals() {
    sigemptyset(&signals_);
    sigaddset(&signals_, end_of_waiting);
    for (const int signal : ending_signals) {
        struct sigaction action = {};
        sigaction(signal, nullptr, &action);
        if (action.sa_handler == SIG_DFL) sigaddset(&signals_, signal);
    }
    pthread_sigmask(SIG_BLOCK, &signals_, &before_);
    waiting_ = std::thread([this] { wait(); });
}

void StopOnSignals::wait() {
    for (int signal = 0; sigwait(&signals_, &signal) == 0 && signal != end_of_waiting;) {
        // While somebody is asked, the signal may come here as well as to the thread that asks.
        if (silent_terminal != none) {
            show_terminal();
        } else if (stop_.request_stop()) {
            caught_ = signal;
            say("qcow: stopping, so that the image is closed in order\n");
            continue;
        }
        std::signal(signal, SIG_DFL);
        pthread_sigmask(SIG_SETMASK, &before_, nullptr);
        raise(signal);
    }
}

StopOnSignals::~StopOnSignals() {
    pthread_kill(waiting_.native_handle(), end_of_waiting);
    waiting_.join();
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    if (caught_ != 0) {
        std::signal(caught_, SIG_DFL);
        raise(caught_);
    }
}

SilentTerminal::SilentTerminal(int terminal) {
    if (tcgetattr(terminal, &shown_terminal) != 0) return;
    works_ = true;
    hidden_terminal = shown_terminal;
    hidden_terminal.c_lflag &= ~static_cast<tcflag_t>(ECHO);
    silent_terminal = terminal;
    struct sigaction action = {};
    action.sa_handler = show_and_end;
    sigset_t ending;
    sigemptyset(&ending);
    for (std::size_t i = 0; i < ending_signals.size(); ++i) {
        sigaction(ending_signals[i], nullptr, &before_[i]);
        if (before_[i].sa_handler == SIG_IGN) continue;
        sigaction(ending_signals[i], &action, nullptr);
        sigaddset(&ending, ending_signals[i]);
    }
    pthread_sigmask(SIG_UNBLOCK, &ending, &mask_);
    action.sa_handler = hide_again;
    sigaction(SIGCONT, &action, &before_continuing_);
    tcsetattr(terminal, TCSAFLUSH, &hidden_terminal);
}

SilentTerminal::~SilentTerminal() {
    if (!works_) return;
    sigaction(SIGCONT, &before_continuing_, nullptr);
    show_terminal();
    silent_terminal = none;
    for (std::size_t i = 0; i < ending_signals.size(); ++i) sigaction(ending_signals[i], &before_[i], nullptr);
    pthread_sigmask(SIG_SETMASK, &mask_, nullptr);
}

}  // namespace tool
