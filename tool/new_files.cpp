#include "new_files.h"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "command.h"
#include "qcow/text.h"

namespace tool {
namespace {

constexpr std::array ending_signals = {SIGINT, SIGTERM, SIGHUP};
std::atomic<const char*> changed_image = nullptr;
constexpr const char* incomplete = "was written in place and is incomplete; its earlier contents are gone";

// In a signal handler: nothing but system calls.

void say(const char* text) {
    const auto written = write(STDERR_FILENO, text, std::strlen(text));
    static_cast<void>(written);
}

void say(const char* path, const char* what) {
    for (const char* text : {"qcow: ", path, ": ", what, "\n"}) say(text);
}

void clean_up_and_end(int signal) {
    qcow::abandon_new_files([](const char* path) { say(path, incomplete); });
    if (const char* path = changed_image) say(path, holds_a_part);
    std::signal(signal, SIG_DFL);
    raise(signal);
}

/// Lets those signals wait, as long as this lives and no other thread takes them.
class SignalsWait {
public:
    SignalsWait() {
        sigset_t waiting;
        sigemptyset(&waiting);
        for (const int signal : ending_signals) sigaddset(&waiting, signal);
        pthread_sigmask(SIG_BLOCK, &waiting, &before_);
    }
    SignalsWait(const SignalsWait&) = delete;
    SignalsWait& operator=(const SignalsWait&) = delete;
    ~SignalsWait() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_ = {};
};

qcow::Result<qcow::NewFile> begin(const std::string& path, qcow::FilesInUse& in_use, const std::string& role,
                                  qcow::NewFile::Existing existing) {
    if (auto verified = verify_names_a_file(path); !verified) return std::unexpected(std::move(verified).error());
    auto file = qcow::NewFile::begin(path, in_use, role, existing);
    if (file && !file->obstacle().empty()) {
        complain(fmt::format("warning: {}: {}, so that it cannot be replaced; it is emptied and written in place",
                             qcow::printable(path), file->obstacle()));
    }
    return file;
}

qcow::Result<void> fill_and_publish(NewFiles& files, qcow::NewFile::Contents contents,
                                    const std::function<qcow::Result<void>(const NewFiles&)>& fill) {
    if (auto filled = fill(files); !filled) return filled;
    if (!files.data_file) return files.image.publish(contents);
    if (contents == qcow::NewFile::Contents::durable) {
        // What takes long and may fail, before one of both has its name.
        for (const auto* file : {&*files.data_file, &files.image})
            if (auto flushed = file->storage()->flush(); !flushed) return flushed;
    }
    const SignalsWait both_or_none;
    if (auto published = files.data_file->publish(contents); !published) return published;
    auto published = files.image.publish(contents);
    if (!published)
        published.error().what +=
            fmt::format("; its data file {} was made and stays", files.data_file->storage()->name());
    return published;
}

}  // namespace

CleanUpOnSignals::CleanUpOnSignals(const char* changed) {
    changed_image = changed;
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
    changed_image = nullptr;
}

qcow::Result<void> make_files(const NewFilesRequest& request, qcow::FilesInUse& in_use,
                              const std::function<qcow::Result<void>(const NewFiles&)>& fill) {
    const CleanUpOnSignals clean_up;
    using enum qcow::NewFile::Existing;
    auto image = begin(request.path, in_use, request.role, replaced);
    if (!image) return std::unexpected(std::move(image).error());
    NewFiles files{*std::move(image), std::nullopt};
    if (!request.data_file_path.empty()) {
        auto data_file = begin(request.data_file_path, in_use, "the data file of " + request.role, only_if_empty);
        if (!data_file) return std::unexpected(std::move(data_file).error().in("data file"));
        files.data_file.emplace(*std::move(data_file));
    }
    auto done = fill_and_publish(files, request.contents, fill);
    if (done) return done;
    auto error = std::move(done).error();
    if (files.image.is_incomplete()) error.what += fmt::format("; {} {}", request.path, incomplete);
    if (files.data_file && files.data_file->is_incomplete())
        error.what += fmt::format("; {} {}", request.data_file_path, incomplete);
    return std::unexpected(std::move(error));
}

qcow::Result<void> verify_names_a_file(const std::string& path) {
    if (path != "-") return {};
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, path,
                                       "stands for standard input or output, and a file is needed here; a file of "
                                       "that name is written \"./-\""});
}

}  // namespace tool
