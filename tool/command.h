#pragma once
// What the commands share: their declaration, common options, opening of images, exit statuses.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "arguments.h"
#include "keys.h"
#include "qcow/files_in_use.h"
#include "qcow/image_spec.h"
#include "qcow/try.h"
#include "signals.h"

namespace tool {

/// Exit statuses. `check` and `convert` have others, too.
inline constexpr int ok = 0;
inline constexpr int failed = 1;

/// Returns the exit status of a command that could not do its work: `failed`, or 2 for `compare`.
int failure_of(std::string_view command);

using Json = nlohmann::ordered_json;

// Each declares a command of `root`, whose callback stores the exit status in `status`.
void declare_bitmap(CLI::App& root, int& status);
void declare_control(CLI::App& root, int& status);
void declare_build(CLI::App& root, int& status);
void declare_info(CLI::App& root, int& status);
void declare_map(CLI::App& root, int& status);
void declare_check(CLI::App& root, int& status);
void declare_compact(CLI::App& root, int& status);
void declare_compare(CLI::App& root, int& status);
void declare_convert(CLI::App& root, int& status);
void declare_create(CLI::App& root, int& status);
void declare_digest(CLI::App& root, int& status);
void declare_measure(CLI::App& root, int& status);
void declare_mount(CLI::App& root, int& status);
void declare_read(CLI::App& root, int& status);
void declare_serve(CLI::App& root, int& status);
void declare_snapshot(CLI::App& root, int& status);
void declare_write(CLI::App& root, int& status);
void declare_zero(CLI::App& root, int& status);
void declare_discard(CLI::App& root, int& status);
void declare_resize(CLI::App& root, int& status);
void declare_rebase(CLI::App& root, int& status);
void declare_commit(CLI::App& root, int& status);
void declare_amend(CLI::App& root, int& status);
void declare_partitions(CLI::App& root, int& status);
void declare_df(CLI::App& root, int& status);
void declare_ls(CLI::App& root, int& status);
void declare_tree(CLI::App& root, int& status);
void declare_find(CLI::App& root, int& status);
void declare_cat(CLI::App& root, int& status);
void declare_get(CLI::App& root, int& status);
void declare_put(CLI::App& root, int& status);
void declare_rm(CLI::App& root, int& status);
void declare_mkdir(CLI::App& root, int& status);

/// Returns the parser of the command line. Running a command stores the exit status in `status`. If `command` is the
/// name of one, the parser knows this command alone, which is quicker; else it knows all of them.
std::unique_ptr<CLI::App> make_app(int& status, std::string_view command = {});

/// Declares a command that calls `run`. An error of `run` is printed, and the exit status is then failure_of(name).
CLI::App& declare(CLI::App& root, int& status, const std::string& name, const std::string& summary,
                  const std::string& help, std::function<qcow::Result<int>()> run);

/// An image as the command line names it.
struct ImageName {
    std::string path;
    qcow::Location location;  // the parsed path
    std::string format;       // empty: guessed
    bool untrusted = false;
    bool image_opts = false;  // `path` is a list of options
    std::string max_kdf_seconds;
};

/// How to open an image for reading only.
struct Source : ImageName {
    std::string snapshot;  // id or name; empty: the active state
    bool force_share = false;
    std::string backing;  // replaces the backing file that the image names; empty: does not
    std::string backing_format;
    bool no_backing = false;
    bool examines = false;  // only metadata: no key is needed
};

/// Parses `name`, and sets the path and location of `source`.
qcow::Result<void> name_source(Source& source, const std::string& name);

/// Turns the name of a new file into its path.
extern const CLI::Validator path_of_new_file;

/// Adds the argument IMAGE and the options of add_open_options. Returns the argument.
CLI::Option* add_source_options(CLI::App& app, Source& source);

/// Adds the options of all commands that read: those for Source, except its path and snapshot.
void add_open_options(CLI::App& app, Source& source);

/// Adds the option that selects an internal snapshot.
CLI::Option* add_snapshot_option(CLI::App& app, Source& source, const std::string& description,
                                 const std::string& name = "-l,--snapshot");

/// Returns the library's description of the source.
qcow::Result<qcow::ImageSpec> spec_of(const Source& source);

/// Returns a function that prints warnings. `format_option` is the option that sets the format that warnings are about.
qcow::Warn warn_on_stderr(std::string_view format_option = "--format");

/// Refuses "-": standard input cannot be read at any offset.
qcow::Result<void> verify_is_not_stdin(const std::string& path);

/// Opens an image. Refuses "-".
qcow::Result<std::shared_ptr<qcow::Image>> open(const qcow::ImageSpec& spec);

/// Opens the image, and the files that it names if `follow` is true.
qcow::Result<std::shared_ptr<qcow::Image>> open_source(const Source& source, bool follow = true);

/// Returns the disk to read: the image itself, or the snapshot that `source` selects.
qcow::Result<std::shared_ptr<qcow::Disk>> disk_of(const std::shared_ptr<qcow::Image>& image, const Source& source);

/// How to open an image for writing.
struct Target : ImageName {
    std::string cache = "writeback";
};

/// Returns the library's description of the target. Its backing file is the one that the image names.
qcow::Result<qcow::ImageSpec> spec_of(const Target& target);

/// Sets up an image for writing, with this value of --cache.
void set_cache(qcow::ImageSpec& spec, const std::string& cache);

/// Adds an option for the format of an image.
void add_format_option(CLI::App& app, std::string& format, const std::string& name, const std::string& description);

/// Adds --force-share, an option of all commands that only read.
void add_force_share_option(CLI::App& app, bool& force_share);

/// Adds the options for the keys of encrypted images, options of all commands that open an image.
void add_encryption_options(CLI::App& app, std::string& max_kdf_seconds);

/// Sets up an image to be read or written if it is encrypted, with this value of --max-kdf-seconds.
void set_keys(qcow::ImageSpec& spec, const std::string& max_kdf_seconds, std::vector<LayerKey> keys = {});

/// Adds --untrusted, an option of all commands that open an image.
void add_untrusted_option(CLI::App& app, bool& untrusted);

/// Adds the argument IMAGE and the options of all commands that write. Returns the argument.
CLI::Option* add_target_options(CLI::App& app, Target& target);

/// Adds the options of add_target_options without IMAGE.
void add_change_options(CLI::App& app, Target& target);

/// Adds -m, the number of threads.
void add_workers_option(CLI::App& app, unsigned& workers);

/// Adds the option for the cache mode.
CLI::Option* add_cache_option(CLI::App& app, std::string& cache, const std::string& names = "-t,--cache");

/// Opens the image for writing, calls `work`, and closes it, also after a signal, which requests a stop. Returns the
/// exit status.
using Change = std::function<qcow::Result<void>(qcow::Image&, const std::stop_token&)>;
qcow::Result<int> change(const Target& target, const Change& work);

/// Refuses a range that exceeds the disk. `path` names the disk in the message.
qcow::Result<void> verify_range(const qcow::Disk& disk, const std::string& path, std::uint64_t at,
                                std::uint64_t length);

/// Prints "qcow: MESSAGE" to standard error.
void complain(const std::string& message);

/// Adds --json, which `description` describes, and --output=human|json, which is the same as qemu-img has it.
void add_output_options(CLI::App& app, bool& json, const std::string& description);

/// Prints JSON to standard output, in printable ASCII. Invalid UTF-8 in names is replaced.
void print_json(const Json& json);

/// Refuses "-", which stands for standard input or output, where only a file will do.
qcow::Result<void> verify_names_a_file(const std::string& path);

}  // namespace tool
