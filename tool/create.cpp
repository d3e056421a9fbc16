// qcow create: makes a new image.

#include <fmt/format.h>

#include "command.h"
#include "create_options.h"
#include "keys.h"
#include "qcow/text.h"
#include "signals.h"
#include "text.h"

namespace tool {
namespace {

struct CreateOptions {
    std::string path;
    std::string size;
    std::string format = "qcow2";
    NewImageArguments image;
    bool unchecked = false;
    bool untrusted = false;
    bool quiet = false;
};

qcow::Result<int> run(const CreateOptions& options) {
    auto made = QCOW_TRY(parse_create_options(options.image, *qcow::format_from_name(options.format), options.path));
    if (!options.size.empty() && made.has("size")) {
        return std::unexpected(
            qcow::Error{qcow::Errc::invalid_argument, "size", "is given twice, as SIZE and as -o size"});
    }
    if (!options.size.empty()) made.size = parse_size(options.size);
    QCOW_TRY_VOID(verify_names_a_file(options.path));
    qcow::CreateJob job{.image = {.path = options.path,
                                  .format = *qcow::format_from_name(options.format),
                                  .options = made,
                                  .untrusted = options.untrusted},
                        .size_of_backing = !made.has("size") && options.size.empty(),
                        .unchecked = options.unchecked};
    // A key that is not for the new image is for its backing file. Without one, nobody is asked.
    if (!made.encryption && keys_are_given()) job.image.keys = key_source();
    job.image.verify = [image = job.image] { return verify_keys_are_needed(image); };
    const CleanUpOnSignals clean_up;
    const auto created = QCOW_TRY(qcow::create(job, {.warn = warn_on_stderr("-f")}));
    if (!options.quiet)
        fmt::print("{}: {}, {}\n", qcow::printable(created.path), options.format, human_exact(created.size));
    return ok;
}

}  // namespace

void declare_create(CLI::App& root, int& status) {
    const auto options = std::make_shared<CreateOptions>();
    auto& app = declare(root, status, "create", "Make a new, empty image",
                        std::string(new_image_help) +
                            "\nExamples:\n"
                            "  qcow create disk.qcow2 20G\n"
                            "  qcow create --key FILE -o encrypt.format=luks disk.qcow2 20G    encrypted\n"
                            "  qcow create -b base.qcow2 -F qcow2 overlay.qcow2    as large as base.qcow2",
                        [options] { return run(*options); });
    app.add_option("IMAGE", options->path,
                   "File to make or replace, or block device to overwrite. A file that is in use is not replaced")
        ->required()
        ->check(name_text)
        ->transform(path_of_new_file);
    app.add_option("SIZE", options->size,
                   "Size of the disk, rounded up to a multiple of 512 (default: the size\n"
                   "of the backing file)")
        ->check(size_text);
    one_of(app.add_option("-f,--format", options->format, "Format of the image"), {"qcow2", "raw", "luks"})
        ->capture_default_str();
    app.add_option("-b,--backing", options->image.backing,
                   "Backing file. A relative path starts at the directory of IMAGE")
        ->type_name("FILE")
        ->check(name_text);
    add_backing_format_option(app, "-F,--backing-format", options->image);
    add_new_image_options(app, options->image);
    app.add_flag("-u,--unchecked", options->unchecked,
                 "Make the image even if the backing file cannot be opened; needs SIZE");
    app.add_flag("--untrusted", options->untrusted,
                 "Do not trust the backing file: open the files that it names only if they are regular files in or "
                 "below its directory");
    add_key_options(app);
    app.add_flag("-q,--quiet", options->quiet, "Print only warnings and errors");
}

}  // namespace tool
