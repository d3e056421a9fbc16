#pragma once
// The options of new images, as commands spell them.

#include <string>
#include <vector>

#include "command.h"
#include "qcow/create.h"

namespace tool {

/// What `-o`, `-b` and `-F` say.
struct NewImageArguments {
    std::vector<std::string> options;  // "name=value,name=value"; a comma that belongs to a value is said twice
    std::string backing;
    std::string backing_format;
};

/// What they come to.
struct NewImageOptions : qcow::CreateOptions {
    bool has_size = false;  // with -o size
};

/// Adds -o, and what its help has to say, to a command that makes images.
void add_new_image_options(CLI::App& app, NewImageArguments& arguments);

/// Adds -F.
void add_backing_format_option(CLI::App& app, const std::string& name, NewImageArguments& arguments);

/// The help text on -o.
extern const char* const new_image_help;

/// Understands them. Errc::invalid_argument names the option that is wrong, and what it can be.
qcow::Result<NewImageOptions> parse_create_options(const NewImageArguments& arguments);

}  // namespace tool
