// qcow create: a new image.

#include <fmt/format.h>

#include "command.h"
#include "create_options.h"
#include "qcow/text.h"
#include "signals.h"
#include "text.h"

namespace tool {
namespace {

struct Options {
    std::string path;
    std::string size;
    std::string format = "qcow2";
    NewImageArguments image;
    bool unchecked = false;
    bool untrusted = false;
    bool quiet = false;
};

qcow::Result<int> run(const Options& options) {
    auto made = QCOW_TRY(parse_create_options(options.image));
    if (!options.size.empty() && made.has_size) {
        return std::unexpected(
            qcow::Error{qcow::Errc::invalid_argument, "size", "it is said twice, as SIZE and with -o size"});
    }
    if (!options.size.empty()) made.size = parse_size(options.size);
    QCOW_TRY_VOID(verify_names_a_file(options.path));
    const qcow::CreateJob job{.image = {.path = options.path,
                                        .format = *qcow::format_from_name(options.format),
                                        .options = made,
                                        .untrusted = options.untrusted},
                              .size_of_backing = !made.has_size && options.size.empty(),
                              .unchecked = options.unchecked};
    const CleanUpOnSignals clean_up;
    const auto created = QCOW_TRY(qcow::create(job, {.warn = warn_on_stderr("-f")}));
    if (!options.quiet)
        fmt::print("{}: {}, {}\n", qcow::printable(created.path), options.format, human_exact(created.size));
    return ok;
}

}  // namespace

void declare_create(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(root, status, "create", "Make a new, empty image",
                        std::string(new_image_help) +
                            "\nExamples:\n"
                            "  qcow create disk.qcow2 20G\n"
                            "  qcow create -b base.qcow2 -F qcow2 overlay.qcow2    as large as its backing file",
                        [options] { return run(*options); });
    app.add_option("IMAGE", options->path,
                   "The file to make, or a block device; a file that has the name is replaced, unless it is in use")
        ->required()
        ->check(name_text)
        ->transform(path_of_new_file);
    app.add_option("SIZE", options->size,
                   "Size of the disk, a multiple of 512 or rounded up to one; that of\n"
                   "the backing file if absent")
        ->check(size_text);
    one_of(app.add_option("-f,--format", options->format, "Its format"), {"qcow2", "raw"})->capture_default_str();
    app.add_option("-b,--backing", options->image.backing, "The backing file, as seen from the image's directory")
        ->type_name("FILE")
        ->check(name_text);
    add_backing_format_option(app, "-F,--backing-format", options->image);
    add_new_image_options(app, options->image);
    app.add_flag("-u,--unchecked", options->unchecked, "Do not look whether the backing file can be opened");
    add_untrusted_option(app, options->untrusted);
    app.add_flag("-q,--quiet", options->quiet, "Print nothing");
}

}  // namespace tool
