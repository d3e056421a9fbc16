// qcow create: a new image.

#include <fmt/format.h>

#include "command.h"
#include "create_options.h"
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

/// Opens the backing file, to see that it is one, and for its size.
qcow::Result<std::uint64_t> backing_size(const Options& options, const qcow::CreateOptions& create) {
    Source source;
    source.path = beside(options.path, create.backing_name);
    source.format = create.backing_format;
    source.untrusted = options.untrusted;
    auto image = open_source(source);
    if (!image) {
        auto error = std::move(image).error();
        return std::unexpected(std::move(error).in("backing file (-u makes the image without looking at it)"));
    }
    return (*image)->size();
}

qcow::Result<void> create_raw(const qcow::NewFile& file, const qcow::CreateOptions& create) {
    if (auto sized = file.storage()->resize(create.size); !sized) return sized;
    if (create.preallocation == qcow::Preallocation::off) return {};
    return file.storage()->allocate({0}, create.size);
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
    if (!create->backing_name.empty()) {
        if (create->backing_format.empty()) {
            return refuse("backing file", "its format is to be recorded; say it with -F (raw, qcow or qcow2)");
        }
        if (!options.unchecked) {
            auto size = backing_size(options, *create);
            if (!size) return std::unexpected(std::move(size).error());
            if (!has_size) create->size = *size;
        }
    }
    if (!has_size && (create->backing_name.empty() || options.unchecked))
        return refuse("size", "how large is the disk to be? Add a SIZE, such as 20G");

    warn_of_ending(options.path, options.format, "-f");
    auto file = qcow::NewFile::begin(options.path);
    if (!file) return std::unexpected(std::move(file).error());
    auto data_file = begin_data_file(options.path, *create);
    if (!data_file) return std::unexpected(std::move(data_file).error());
    const auto made =
        options.format == "raw"
            ? create_raw(*file, *create)
            : qcow::create_image({file->storage(), *data_file ? (*data_file)->storage() : nullptr}, *create);
    if (!made) return std::unexpected(made.error());
    if (*data_file) {
        if (auto published = (*data_file)->publish(); !published) return std::unexpected(std::move(published).error());
    }
    if (auto published = file->publish(); !published) return std::unexpected(std::move(published).error());
    if (!options.quiet)
        fmt::print("{}: {}, {}\n", qcow::printable(options.path), options.format, human_exact(create->size));
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
    app.add_option("IMAGE", options->path, "The file to make; one that has the name is replaced, unless it is in use")
        ->required()
        ->check(name_text);
    app.add_option("SIZE", options->size, "Size of the disk; that of the backing file if absent")->check(size_text);
    one_of(app.add_option("-f,--format", options->format, "Its format"), {"qcow2", "raw"})->capture_default_str();
    app.add_option("-b,--backing", options->image.backing, "The backing file, as seen from the image's directory")
        ->type_name("FILE")
        ->check(name_text);
    add_backing_format_option(app, options->image);
    add_new_image_options(app, options->image);
    app.add_flag("-u,--unchecked", options->unchecked, "Do not look whether the backing file can be opened");
    add_untrusted_option(app, options->untrusted);
    app.add_flag("-q,--quiet", options->quiet, "Print nothing");
}

}  // namespace tool
