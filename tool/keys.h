#pragma once
// Keys of encrypted images: the options that name them, and the prompt.

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "qcow/create.h"
#include "qcow/key.h"

namespace tool {

/// What --image-opts says of the key of a layer; empty: nothing.
struct LayerKey {
    std::string secret = {};  ///< the id of an object
    std::string method = {};  ///< KeyRequest::method
};

/// Adds --object, --key and --key-fd, options of all commands that read or write the contents of images. A process runs
/// one command, so their values are kept once.
void add_key_options(CLI::App& app);

/// Returns a source of keys for the layers of images. `layers[i]` is what --image-opts says of layer i of `image`,
/// whose key also opens that layer as an image of its own. A method that is not that of the layer is refused. Without
/// an id, a layer takes the secret that the name of its file gives, if --object defines it, or the next key of --key
/// and --key-fd, the last of which serves for all further layers, unless it is the key of a new image. Without these,
/// it takes the only secret of --object that -o does not name, or else a person is asked.
qcow::KeySource key_source(std::vector<LayerKey> layers = {}, std::string image = {});

/// Returns the secret with this id, which -o names. From then on it is not taken for the key of an image. Errors:
/// Errc::invalid_argument: --object does not define it; those of reading it.
qcow::Result<std::shared_ptr<const qcow::Secret>> secret_of(const std::string& id);

/// The same for a key that is to open an image from now on. Errors: Errc::invalid_argument, also if it is empty.
qcow::Result<std::shared_ptr<const qcow::Secret>> new_secret_of(const std::string& id);

/// Returns the key of a new image, in the way of key_source, but the last one of --key and --key-fd: images that are
/// read come first. A person is asked twice. `path` names the image. Errors:
/// Errc::invalid_argument if it is empty.
qcow::Result<std::shared_ptr<const qcow::Secret>> new_key(const std::string& path);

/// Whether --key or --key-fd gives a key.
bool keys_are_given();

/// Refuses a new image without encryption if --key and --key-fd give a key that nothing has used: who gives a key wants
/// what is made to be encrypted. Called once everything that is read is open.
qcow::Result<void> verify_keys_are_needed(const qcow::NewImage& image);

/// Warns of a new key slot that takes longer to open than commands allow by default.
void warn_of_iter_time(std::uint32_t iter_time_ms);

/// Warns of values of --key and --key-fd that were not needed.
void warn_of_unused_keys();

/// Wipes the keys: another process has opened the image with them, and has warned of those that were not needed.
void forget_keys();

/// Returns the arguments of the command line, the name of the program left out. The secrets of --object (data=) are
/// moved into locked memory, and a number takes the place of each. On the command line they are overwritten, so that
/// lists of processes do not show them.
std::vector<std::string> take_arguments(int argc, char** argv);

}  // namespace tool
