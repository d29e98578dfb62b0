"""How one asks about a function: the phrasings of the dataset docs.

{} is a name, or what a thing does. The last N_TEST of each kind are for the test alone, the one
before them is for validation.
"""

N_TEST = 3


def lines_of(text):
    """The lines of a text, without the space around them, as a list."""
    return [line.strip() for line in text.strip().splitlines()]


QUESTIONS = {
    "does": lines_of("""
        What does {} do?
        What is {} for?
        Explain {}.
        What is the purpose of {}?
        Describe {} in one sentence.
        Tell me what {} does.
        {}: what is it?
        What happens when I use {}?
        What is {}?
        What will {} do?
        Say what {} is for.
        Please explain {} to me.
        I do not understand {}. What does it do?
        What can I do with {}?
        Could you describe {}?
        What is the meaning of {}?
        When is {} useful?
        What does the documentation say about {}?
        Give a short description of {}.
        I would like to know what {} does.
        Say in a few words what {} is.
        {}, what does it do?
        Define {}.
        What job does {} have?
        I found {} in some code. What is it good for?
        Can you tell me about {}?
        Why would I use {}?
        In short, what can {} do for me?
        How would you explain {}?
        Summarise {}.
        What is {} good for?
        What is the use of {}?
        I saw {}. What is that?
        What does calling {} do?
        What is the idea of {}?
        Can {} help me? What does it do?
        Remind me what {} does.
        Tell me about {}.
        Describe {}.
        Which task does {} solve?
        Give me the gist of {}.
        What does one use {} for?
        {} - what does that do?
        Is {} something that I would need? What for?
        {} - what is it about?
        {} ... remind me what that is.
        Take {}. What is it there for?
        About {}: what is it?
        How does {} work?
        How do I use {}?
        And {}?
        And what about {}?
        Help me understand {}.
        Do you know what {} is about?
        What effect does {} have?
        What does {} return?
        What do I get from {}?
        What results from {}?
        So what exactly is {}?
        Never heard of {}, what is it?
        I wonder what {} might do.
        If I run {}, what happens?
        My code uses {}. Why?
        For what would one want {}?
        Is there a one-line description of {}?
        Quick summary of {}?
        Documentation of {}, please.
        Info on {}.
        What's {}?
        What's {} for?
        What's the point of {}?
        A word on {}, please.
        Tell me a bit more on {}.
        Could you say what {} does?
        Do you know what {} does?
        Could you explain in a sentence what {} is for?
        I keep seeing {} in other people's code; tell me its purpose.
        Give me a short description of what happens when I call {}.
        """),
    "arguments": lines_of("""
        Which arguments does {} take?
        What are the arguments of {}?
        What is the signature of {}?
        Show the parameters of {}.
        How do I call {}?
        Name the arguments of {}.
        {}: which parameters?
        What can be passed to {}?
        How is {} called?
        List the arguments of {}.
        Which arguments can {} have?
        What does {} take as arguments?
        Please show the signature of {}.
        {}, which arguments?
        Write down the parameters of {}.
        Which values do I give to {}?
        With which arguments is {} called?
        What does {} accept?
        Tell me the arguments of {}.
        How must I call {}?
        What goes into the brackets of {}?
        I want to call {}. With what?
        What should be passed to {}?
        What parameters are there in {}?
        What does a call of {} look like?
        Which parameters does {} have?
        What do I pass to {}?
        Give me the signature of {}, please.
        What can I give to {}?
        How many arguments does {} have, and which?
        Show me how {} is called.
        Which inputs does {} want?
        What do the arguments of {} look like?
        I forgot the arguments of {}.
        What must I hand to {}?
        Does {} take arguments? Which?
        Please list what {} takes.
        What do I need to call {}?
        Which options does {} have?
        Could you show what {} takes?
        What arguments should I give {}?
        Can you list the parameters of {}?
        What does the signature of {} look like?
        And the arguments of {}?
        {} - how is that called?
        {} takes what?
        Calling {} requires what?
        Signature of {}?
        Arguments for {}, please.
        Args of {}?
        What's the signature of {}?
        What are the parameters that {} expects?
        What does {} expect to be given?
        Which keyword arguments are there for {}?
        How would one call {}?
        What stands between the brackets of {}?
        About {}: which arguments are there?
        Is there anything that I must pass to {}?
        Can I see the signature of {}?
        Let me see the parameters of {}.
        If I call {}, what do I give it?
        Do you know the arguments of {}?
        What inputs are needed for {}?
        Which of its arguments can I set in {}?
        What does {} need?
        {} wants which parameters?
        How was {} defined?
        What parameters can {} be called with?
        What's passed to {}?
        I never remember what {} takes.
        What order do the arguments of {} have?
        Tell me how to call {}.
        Do I have to give {} anything?
        In which way is {} called?
        Show me the signature of {}, please.
        What parameters can be passed to {}?
        I'm about to call {} and need to know what goes between the parentheses.
        """),
    "module": lines_of("""
        In which module is {}?
        Which module has {}?
        Where is {} defined?
        What do I import to use {}?
        From which module does {} come?
        Name the module of {}.
        {}: which module?
        Which module must I import for {}?
        Which module contains {}?
        Where does {} live?
        Where does {} come from?
        What must be imported for {}?
        {}, in which module?
        Tell me the module of {}.
        In what module can I find {}?
        Which import gives me {}?
        What is the home of {}?
        Where in the standard library is {}?
        Which part of the standard library has {}?
        Please name the module that has {}.
        I need {}. Which module has it?
        What module is {} in?
        Who provides {}?
        From where can I import {}?
        Where do I find {}?
        To which module does {} belong?
        What is the module of {} called?
        I want to use {}. What should I import?
        Which module do I need for {}?
        Where is {} kept?
        Where in Python is {}?
        What should I import to get {}?
        What has {} in it?
        {} belongs to which module?
        Where should I look for {}?
        Which library module offers {}?
        Tell me where {} is.
        Which module defines {}?
        How do I import {}?
        Which module gives me {}?
        Which module is home to {}?
        What module should I import for {}?
        Where can I import {} from?
        And {}, where is that?
        {} - from which module?
        {} is in what module?
        {} comes from where?
        {} is defined where?
        Module of {}?
        About {}: in which module is it?
        What's the module of {}?
        What's the import for {}?
        Is {} in some module?
        Whose is {}?
        How can I get {}?
        Which module do I find {} in?
        Which module has {} in it?
        In what part of the library is {}?
        If I need {}, what do I import?
        To use {}, I import what?
        Do you know where {} is?
        Do you know which module has {}?
        Can you tell me which module {} is from?
        Let me know the module of {}.
        Where did Python put {}?
        Before I can use {}, what must I import?
        What do I have to import before using {}?
        Which package is {} in?
        What package offers {}?
        I am searching for {}. Where is it?
        Which file would I open to find {}?
        Where is the code of {}?
        What does {} belong to?
        Where do I have to import {} from?
        Tell me the name of the standard library module that defines {}.
        I want to use {}, but what module does it belong to?
        """),
    "which": lines_of("""
        Which name does this: {}
        What is it called: {}
        Find the name for this: {}
        I am looking for this: {}
        Name what fits this: {}
        What has this description: {}
        Which function, method or class is meant? {}
        Whose documentation begins like this: {}
        What does this: {}
        I need this: {}
        Which name fits: {}
        Search for this: {}
        Name it: {}
        What is the name? {}
        This is what I want: {}
        Which thing of Python is this? {}
        What do I need for this: {}
        Guess the name: {}
        Tell me the name of this: {}
        What could I call for this? {}
        How is this called: {}
        What was the name of this again: {}
        Look this up: {}
        Which one is it? {}
        What should I use for this: {}
        What in the standard library does this: {}
        Is there anything for this? {}
        Help me find this: {}
        Something for this: {}
        What can do this: {}
        Which name has this description: {}
        Is there a name for this: {}
        Find this: {}
        How do I do this: {}
        Who does this: {}
        Give me the name for this: {}
        I want this: {}
        What would do this: {}
        What is meant by this: {}
        What is this thing called: {}
        What do you call this: {}
        I forgot the name of this: {}
        Which part of the library does this: {}
        How can I do this? {}
        How would one do this: {}
        What function is there for this: {}
        What function does this? {}
        Which class or function does this: {}
        Which method has this job: {}
        Is there a function for this? {}
        Does Python have something for this: {}
        Does the library have this: {}
        I want to do this. What do I call? {}
        I need something that does this: {}
        What name should I look for? {}
        Wanted: {}
        The name of this, please: {}
        Do you know what does this: {}
        Do you know the name of this? {}
        Can you name what does this: {}
        What's the name of this: {}
        What's this called? {}
        Which call would give me this: {}
        With what do I do this: {}
        What in Python is for this: {}
        Something in the library does this. What is it? {}
        If I want this, what do I use? {}
        Tell me what does this: {}
        Which thing is described by this: {}
        Suppose that I need this: {}
        Please find the function for this: {}
        What did Python call this: {}
        What is there for this: {}
        I've forgotten the name of the function whose documentation mentions the following: {}
        Can you name the standard library function or class I need for this? {}
        Tell me what the function or class is called that handles the following: {}
        """),
    "exists": lines_of("""
        Does {} exist?
        Is there {} in the standard library?
        Is {} a real name?
        Does Python have {}?
        Can I use {} in Python?
        {}: does it exist?
        Is {} part of Python?
        Tell me whether {} exists.
        Is there {}?
        Is {} there?
        Does the standard library have {}?
        Is {} in the library?
        Does Python know {}?
        Could {} be a real name?
        I think there is {}. Is that true?
        Is {} available?
        {}, is that real?
        Has Python got {}?
        Is it true that {} exists?
        Would Python find {}?
        Can {} be imported?
        Say whether there is {}.
        Am I right that {} exists?
        Is {} included in Python?
        Do you know {}?
        Have you heard of {}?
        Is {} something that Python comes with?
        Is there really {}?
        Did someone write {}?
        Have you seen {} before?
        Do I have {} in Python?
        Is there a thing named {}?
        Would {} work?
        Do we have {}?
        Are you sure there is {}?
        Can I call {}?
        Is {} known?
        Is the name {} right?
        Will I find {} in Python?
        Is there such a thing as {}?
        Does anything like {} exist?
        Is {} something I can use?
        Is {} in Python's library?
        Is {} something?
        Is {} something in Python?
        Is {} a thing?
        Is {} a function that I could call?
        Is {} something that exists?
        Is {} made up?
        Was {} ever in Python?
        Did you ever see {}?
        Does {} ring a bell?
        Does {} come with Python?
        Does Python ship {}?
        Does Python offer {}?
        Do you have {}?
        Are there things like {}?
        Python has {}, right?
        There is {}, or not?
        {} exists, does it not?
        {} - is there such a thing?
        {}? Does that exist?
        About {}: is it there?
        May I use {}?
        Could I use {}?
        Can I import {}?
        Can I rely on {} being there?
        Should I find {} in Python?
        Is it possible to use {}?
        Is the standard library home to {}?
        Somebody told me of {}. Is it real?
        I read about {}. Does it exist?
        Someone used {}. Is that part of Python?
        Please check that {} exists.
        Check whether there is {}.
        Do you know whether {} exists?
        Would you know {}?
        What about {}, is it there?
        Is there really something called {} in Python's standard library?
        Can you confirm that {} is part of the standard library and not something I made up?
        I'm not sure whether the standard library has {}; does it?
        """),
}
# about what the question before named; the last N_TEST are for the test alone
FOLLOW_UPS = lines_of("""
    And its arguments?
    Which arguments does it take?
    How do I call it?
    What are its parameters?
    And the signature?
    Show its arguments.
    With which arguments?
    What can be passed to it?
    How is it called?
    Now the arguments, please.
    What do I pass to it?
    And what does it take?
    Which parameters has it got?
    What arguments does it have?
    How must I call it?
    Which arguments can I give?
    Its signature, please.
    What are the arguments?
    Which parameters does that have?
    And how would I call that?
    Its arguments?
    And which arguments?
    And how do I call it?
    And the parameters?
    What does it need?
    What does it expect?
    What does it want?
    What do I give it?
    Can you show the signature?
    Show me how to call it.
    Tell me its arguments.
    And what are the arguments of that?
    What's its signature?
    Which parameters?
    Which inputs does it need?
    What goes into the brackets?
    How do I call that?
    And what should I pass?
    List its parameters.
    Do I pass anything?
    And what arguments does it take?
    Now list the parameters of that function, please.
    OK, so what do I have to pass to it?
""")


def phrasings(kind, split):
    """The phrasings of a kind of question that a split may use, a list."""
    every = FOLLOW_UPS if kind == "conversation" else QUESTIONS[kind]
    of_split = {
        "train": every[: -N_TEST - 1],
        "val": every[-N_TEST - 1 : -N_TEST],
        "test": every[-N_TEST:],
    }
    return of_split[split]
