// qcow create: a new image.

#include <fmt/format.h>

#include "command.h"
#include "create_options.h"
#include "new_files.h"
#include "qcow/text.h"
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

Source backing_source(const Options& options, const qcow::CreateOptions& create) {
    Source source;
    source.path = beside(options.path, create.backing_name);
    source.format = create.backing_format;
    source.untrusted = options.untrusted;
    return source;
}

/// Opens the backing file, to see that it is one, and for its size.
qcow::Result<std::uint64_t> backing_size(const Source& source, qcow::FilesInUse& in_use) {
    auto image = open_source(source);
    if (!image) {
        auto error = std::move(image).error();
        return std::unexpected(std::move(error).in("backing file (-u makes the image without looking at it)"));
    }
    if (auto added = in_use.add(qcow::FilesInUse::Use::read, **image, "its backing file"); !added)
        return std::unexpected(std::move(added).error());
    return (*image)->size();
}

/// What is there of a backing file that need not be there is nevertheless not to be overwritten.
qcow::Result<void> add_unchecked_backing(Source source, qcow::FilesInUse& in_use) {
    source.force_share = true;
    return in_use.add_unopened(qcow::FilesInUse::Use::read, source.path, open_options(source), "its backing file");
}

qcow::Result<int> run(const Options& options) {
    auto create = parse_create_options(options.image);
    if (!create) return std::unexpected(std::move(create).error());
    const auto refuse = [](std::string place, std::string what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, std::move(place), std::move(what)});
    };
    if (!options.size.empty() && create->has_size) return refuse("size", "it is said twice, as SIZE and with -o size");
    if (!options.size.empty()) create->size = parse_size(options.size);
    const bool has_size = create->has_size || !options.size.empty();
    if (options.format == "raw" && !(create->backing_name + create->data_file_name).empty())
        return refuse("target format", "raw images have no backing file and no data file; leave -f raw out");
    qcow::FilesInUse in_use;
    if (!create->backing_name.empty()) {
        if (create->backing_format.empty()) {
            return refuse("backing file", "its format is to be recorded; say it with -F (raw, qcow or qcow2)");
        }
        const auto source = backing_source(options, *create);
        if (options.unchecked) {
            if (auto added = add_unchecked_backing(source, in_use); !added)
                return std::unexpected(std::move(added).error());
        } else {
            auto size = backing_size(source, in_use);
            if (!size) return std::unexpected(std::move(size).error());
            if (!has_size) create->size = *size;
        }
    }
    if (!has_size && (create->backing_name.empty() || options.unchecked))
        return refuse("size", "how large is the disk to be? Add a SIZE, such as 20G");

    NewFilesRequest request{options.path, "the new image", {}};
    if (!create->data_file_name.empty()) request.data_file_path = beside(options.path, create->data_file_name);
    const auto made = make_files(request, in_use, [&](const NewFiles& files) {
        warn_of_ending(options.path, options.format, "-f");
        return options.format == "raw" ? qcow::create_raw_image(files.image.storage(), *create)
                                       : qcow::create_image(files.storages(), *create);
    });
    if (!made) return std::unexpected(made.error());
    if (!options.quiet)
        fmt::print("{}: {}, {}\n", qcow::printable(options.path), options.format,
                   human_exact(qcow::rounded_size(create->size)));
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
