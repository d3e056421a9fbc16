#pragma once
// What the commands share: how they are declared, how they open their source, what they return.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "arguments.h"
#include "qcow/files_in_use.h"
#include "qcow/image_spec.h"
#include "qcow/try.h"

namespace tool {

/// Exit statuses. `check` has more of its own.
inline constexpr int ok = 0;
inline constexpr int failed = 1;

/// The exit status of a command that could not do its work: `failed`, where that does not mean something else.
int failure_of(std::string_view command);

using Json = nlohmann::ordered_json;

/// Declares a command under `root`. Its callback puts the exit status into `status`.
using Declare = void (*)(CLI::App& root, int& status);

void declare_info(CLI::App& root, int& status);
void declare_map(CLI::App& root, int& status);
void declare_check(CLI::App& root, int& status);
void declare_compare(CLI::App& root, int& status);
void declare_convert(CLI::App& root, int& status);
void declare_create(CLI::App& root, int& status);
void declare_digest(CLI::App& root, int& status);
void declare_read(CLI::App& root, int& status);
void declare_serve(CLI::App& root, int& status);
void declare_snapshot(CLI::App& root, int& status);
void declare_write(CLI::App& root, int& status);
void declare_zero(CLI::App& root, int& status);
void declare_discard(CLI::App& root, int& status);
void declare_resize(CLI::App& root, int& status);
void declare_rebase(CLI::App& root, int& status);

/// The whole command line. Running a command puts the exit status into `status`.
std::unique_ptr<CLI::App> make_app(int& status);

/// Declares a command whose work is `run`: an error that it gives is printed, and the status is then
/// failure_of(name).
CLI::App& declare(CLI::App& root, int& status, const std::string& name, const std::string& summary,
                  const std::string& help, std::function<qcow::Result<int>()> run);

/// How an image that is only read is opened.
struct Source {
    std::string path;
    qcow::Location location;  // that the path was parsed into
    std::string format;       // empty: probed
    std::string snapshot;     // id or name; empty: the active state
    bool force_share = false;
    std::string backing;  // in place of the backing file that the image names; empty: that one
    std::string backing_format;
    bool no_backing = false;
    bool untrusted = false;
};

/// Makes the source the image of this name.
qcow::Result<void> name_source(Source& source, const std::string& name);

/// Turns the name of a file that is to be made into its path.
extern const CLI::Validator path_of_new_file;

/// The positional IMAGE and the options of add_open_options.
void add_source_options(CLI::App& app, Source& source);

/// The options that all readers have: all of Source but its path and snapshot.
void add_open_options(CLI::App& app, Source& source);

/// The option that says which internal snapshot is meant.
CLI::Option* add_snapshot_option(CLI::App& app, Source& source, const std::string& description);

/// As the library takes it.
qcow::Result<qcow::ImageSpec> spec_of(const Source& source);

/// Prints warnings. `format_option` is the one that says the format that a warning is about.
qcow::Warn warn_on_stderr(std::string_view format_option = "--format");

/// Refuses "-": images are read in any order, and standard input is not.
qcow::Result<void> verify_is_not_stdin(const std::string& path);

/// Opens an image. Refuses "-".
qcow::Result<std::shared_ptr<qcow::Image>> open(const qcow::ImageSpec& spec);

/// Opens the image with all that it names; with `follow` false by itself.
qcow::Result<std::shared_ptr<qcow::Image>> open_source(const Source& source, bool follow = true);

/// The disk to read: the image itself, or the snapshot that was asked for.
qcow::Result<std::shared_ptr<qcow::Disk>> disk_of(const std::shared_ptr<qcow::Image>& image, const Source& source);

/// How an image that is changed is opened.
struct Target {
    std::string path;
    qcow::Location location;  // that the path was parsed into
    std::string format;       // empty: probed
    std::string cache = "writeback";
    bool untrusted = false;
};

/// As the library takes it.
qcow::ImageSpec spec_of(const Target& target);

/// Makes an image one that is written, with the --cache that was said.
void set_cache(qcow::ImageSpec& spec, const std::string& cache);

/// The option that says the format of an image.
void add_format_option(CLI::App& app, std::string& format, const std::string& name, const std::string& description);

/// Reading without locks: an option of all commands that only read.
void add_force_share_option(CLI::App& app, bool& force_share);

/// What images may name that come from a stranger: an option of all commands that open one.
void add_untrusted_option(CLI::App& app, bool& untrusted);

/// The positional IMAGE and the options that all writers have.
void add_target_options(CLI::App& app, Target& target);

/// How many threads work: an option of those that take long.
void add_workers_option(CLI::App& app, unsigned& workers);

/// When writes reach the disk: an option of those that change an image.
CLI::Option* add_cache_option(CLI::App& app, std::string& cache);

/// Opens the image for writing, does `work` on it, and closes it. Gives the exit status.
qcow::Result<int> change(const Target& target, const std::function<qcow::Result<void>(qcow::Image&)>& work);

/// Refuses a range that reaches past the end of the disk. `path` names it in the message.
qcow::Result<void> verify_range(const qcow::Disk& disk, const std::string& path, std::uint64_t at,
                                std::uint64_t length);

/// Prints to standard error, as "qcow: ...".
void complain(const std::string& message);

/// Prints JSON to standard output, all of it printable ASCII. What is not UTF-8 in names is replaced.
void print_json(const Json& json);

/// Refuses "-", which stands for standard input or output and is not meant to become a file.
qcow::Result<void> verify_names_a_file(const std::string& path);

}  // namespace tool
