// qcow resize: another virtual size.

#include <fmt/format.h>

#include "command.h"
#include "qcow/text.h"

namespace tool {
namespace {

struct Options {
    Target target;
    std::string size;
    bool shrink = false;
};

bool is_relative(const std::string& size) { return size.starts_with('+') || size.starts_with('-'); }

/// A size, or with a sign in front how much is added or taken away.
const CLI::Validator new_size_text(
    [](std::string& text) {
        auto size = text.substr(is_relative(text) ? 1 : 0);
        return size_text(size);
    },
    "");

qcow::Result<void> resize(qcow::Image& image, const Options& options) {
    const auto refuse = [&](std::string what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, options.target.path, std::move(what)});
    };
    const std::uint64_t old_size = image.size();
    std::uint64_t size = parse_size(options.size.substr(is_relative(options.size) ? 1 : 0));
    if (options.size.starts_with('-')) {
        if (size > old_size) return refuse(fmt::format("the disk has {} bytes, {} fewer cannot be", old_size, size));
        size = old_size - size;
    } else if (options.size.starts_with('+')) {
        if (size > largest_size - old_size) return refuse("no disk can be that large");
        size += old_size;
    }
    if (const auto rounded = qcow::rounded_size(size); rounded != size) {
        complain(fmt::format("{}: {} bytes are not a multiple of {}; rounded up to {}",
                             qcow::printable(options.target.path), size, qcow::sector_bytes, rounded));
        size = rounded;
    }
    if (size < old_size && !options.shrink) {
        return refuse(
            fmt::format("the disk has {} bytes, and what lies past {} would be lost; say --shrink if that is meant",
                        old_size, size));
    }
    return image.resize(size, options.shrink ? qcow::Image::Shrink::allow : qcow::Image::Shrink::refuse);
}

}  // namespace

void declare_resize(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "resize", "Change the virtual size",
        "What is added reads as zeros. What is cut off is lost, and the file ends behind what is left. Bitmaps\n"
        "become of the new size; in them, what is added has not changed. Sizes are rounded up to multiples of 512.\n"
        "Examples:\n"
        "  qcow resize disk.qcow2 20G\n"
        "  qcow resize disk.qcow2 +1.5G           larger by so much\n"
        "  qcow resize --shrink disk.qcow2 -512M  smaller by so much",
        [options] { return change(options->target, [&](qcow::Image& image) { return resize(image, *options); }); });
    add_target_options(app, options->target);
    app.add_option("SIZE", options->size, "The new size, or with + or - in front the change")
        ->required()
        ->check(new_size_text);
    app.add_flag("--shrink", options->shrink, "Allow that the disk becomes smaller");
}

}  // namespace tool
