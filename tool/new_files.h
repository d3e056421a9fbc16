#pragma once
// The files that a command makes: begun, filled and given their names in one way.

#include <array>
#include <csignal>
#include <functional>
#include <optional>
#include <string>

#include "qcow/create.h"
#include "qcow/files_in_use.h"

namespace tool {

/// An image that is being made, and its data file if it is to have one.
struct NewFiles {
    qcow::NewFile image;
    std::optional<qcow::NewFile> data_file;

    /// As the library takes them.
    [[nodiscard]] qcow::NewImageFiles storages() const {
        return {image.storage(), data_file ? data_file->storage() : nullptr};
    }
};

/// What is to be made.
struct NewFilesRequest {
    std::string path;
    std::string role;            // see FilesInUse
    std::string data_file_path;  // empty: none
    qcow::NewFile::Contents contents = qcow::NewFile::Contents::durable;
};

/// As long as this lives, SIGINT, SIGTERM and SIGHUP clean up before they end the process: nothing of a new file is
/// left, and what is written in place is said to be incomplete. Signals that are ignored stay so.
class CleanUpOnSignals {
public:
    /// `changed` is an image that is changed meanwhile, and said to be so; it must live as long.
    explicit CleanUpOnSignals(const char* changed = nullptr);
    CleanUpOnSignals(const CleanUpOnSignals&) = delete;
    CleanUpOnSignals& operator=(const CleanUpOnSignals&) = delete;
    ~CleanUpOnSignals();

private:
    std::array<struct sigaction, 3> before_ = {};
};

/// What is said of an image that was to take all of a source, and did not.
inline constexpr const char* holds_a_part = "holds only a part of the source";

/// Begins the files, lets `fill` give them contents, and publishes them, the data file first. SIGINT, SIGTERM and
/// SIGHUP end the process as ever and leave nothing behind. A file that has to be written in place is warned of before,
/// and what became of it is said where it stays incomplete.
qcow::Result<void> make_files(const NewFilesRequest& request, qcow::FilesInUse& in_use,
                              const std::function<qcow::Result<void>(const NewFiles&)>& fill);

/// Refuses "-", which stands for standard input or output and is not meant to become a file.
qcow::Result<void> verify_names_a_file(const std::string& path);

}  // namespace tool
